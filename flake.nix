{
  description = "Continuous deployment of Nix profiles: an open implementation of Cachix Deploy";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # Only `lib.darwin` and `lib.homeManager` use these. Name yours by `follows`, and nothing else
    # is fetched: an empty one means this flake itself.
    darwin.follows = "";
    home-manager.follows = "";
  };

  outputs =
    {
      self,
      nixpkgs,
      darwin,
      home-manager,
    }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "x86_64-darwin"
        "aarch64-darwin"
      ];
      forAllSystems =
        function: lib.genAttrs systems (system: function nixpkgs.legacyPackages.${system});
      packagesOf = pkgs: {
        inherit (import ./default.nix { inherit pkgs; }) cachix-deploy cachix cachix-workspace;
      };
      given = input: function: if input.lib ? ${function} then input else null;
    in
    {
      packages = forAllSystems (
        pkgs: packagesOf pkgs // { default = (packagesOf pkgs).cachix-deploy; }
      );

      # `cachix` is left out: it would replace Cachix's own client in all of nixpkgs.
      overlays.default = final: _prev: {
        inherit (packagesOf final) cachix-deploy cachix-workspace;
      };

      nixosModules = {
        cachix-deploy = ./nix/nixos.nix;
        cachix-workspace = ./nix/workspace.nix;
        default.imports = [
          ./nix/nixos.nix
          ./nix/workspace.nix
        ];
      };
      darwinModules = rec {
        cachix-deploy = ./nix/darwin.nix;
        default = cachix-deploy;
      };
      homeModules = rec {
        cachix-deploy = ./nix/home-manager.nix;
        default = cachix-deploy;
      };
      homeManagerModules = self.homeModules;

      lib = import ./nix/lib.nix {
        agent = {
          nixos = ./nix/nixos.nix;
          darwin = ./nix/darwin.nix;
          homeManager = ./nix/home-manager.nix;
        };
        darwin = given darwin "darwinSystem";
        home-manager = given home-manager "homeManagerConfiguration";
      };

      templates.default = {
        path = ./nix/template;
        description = "A fleet of machines that CI deploys to";
      };

      checks = forAllSystems (
        pkgs:
        packagesOf pkgs
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
          units =
            let
              machine = lib.nixosSystem {
                inherit (pkgs.stdenv.hostPlatform) system;
                modules = [
                  self.nixosModules.default
                  {
                    services.cachix-deploy.enable = true;
                    services.cachix-workspace.enable = true;
                  }
                ];
              };
              unit = name: machine.config.systemd.units."${name}.service".unit;
            in
            pkgs.linkFarmFromDrvs "units" [
              (unit "cachix-deploy")
              (unit "cachix-workspace")
            ];
        }
      );

      formatter = forAllSystems (pkgs: pkgs.nixfmt-tree or pkgs.nixfmt-rfc-style);

      devShells = forAllSystems (pkgs: {
        default = pkgs.mkShell {
          packages = [
            pkgs.git
            pkgs.gnumake
            pkgs.nix
            pkgs.python3
          ];
        };
      });
    };
}

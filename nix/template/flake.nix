{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    cachix-deploy.url = "github:example/cachix-deploy"; # where you got this template from
    cachix-deploy.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    { nixpkgs, cachix-deploy, ... }:
    let
      pkgs = nixpkgs.legacyPackages.x86_64-linux;
      deploy = cachix-deploy.lib pkgs;
    in
    {
      # CI: nix build .#deploy && nix run .#cachix-deploy -- activate --push result
      packages.x86_64-linux.cachix-deploy = cachix-deploy.packages.x86_64-linux.default;
      packages.x86_64-linux.deploy = deploy.spec {
        agents.web = deploy.nixos {
          networking.hostName = "web";
          services.cachix-deploy = {
            enable = true;
            host = "https://deploy.example.org";
          };
          imports = [ ./web.nix ];
        };
      };
    };
}

# NixOS, nix-darwin and home-manager as far as the modules in nix/ know them: their options,
# strictly typed, and how they write units. `evaluate` gives what tests/test_modules.py looks at.
# Where nixpkgs' lib, nix-darwin or home-manager are there in full, they take the place of the
# stand-ins.
{
  kind, # nixos, darwin or home-manager
  modules, # under test, and their settings
  platform ? if kind == "darwin" then "aarch64-darwin" else "x86_64-linux",
  nixpkgsLib ? "",
  homeManager ? "",
  nixDarwin ? "",
  packages ? { },
}:
let
  isReal = nixpkgsLib != "";
  lib = if isReal then import (/. + nixpkgsLib + "/lib") else import ./nixlib.nix;
  inherit (lib) mkOption types;

  # a package that nobody has to build
  fake = name: rec {
    type = "derivation";
    inherit name;
    outPath = "/nix/store/${builtins.hashString "md5" name}-${name}";
    out = outPath;
  };
  python = lib.genAttrs [
    "alembic"
    "ansi2html"
    "cryptography"
    "docopt"
    "flask"
    "flask-smorest"
    "flask-wtf"
    "gunicorn"
    "prometheus-client"
    "boto3"
    "psycopg"
    "requests"
    "setuptools"
    "sqlalchemy"
    "websocket-client"
    "wsproto"
  ] fake;
  isDarwin = builtins.match ".*-darwin" platform != null;
  pkgs =
    lib.genAttrs [ "cachix" "coreutils" "findutils" "gnugrep" "gnused" "nix" "systemd" ] fake
    // {
      inherit lib;
      formats.ini = _: { type = types.attrs; };
      runCommand = name: _: _: fake name;
      writeScript = name: _: fake name;
      writeTextFile = { name, ... }: fake name;
      cacert = fake "cacert";
      stdenv = {
        shell = "/bin/sh";
        hostPlatform = {
          inherit isDarwin;
          isLinux = !isDarwin;
          system = platform;
        };
      };
      callPackage =
        file: args:
        import file (
          args
          // {
            inherit lib;
            installShellFiles = fake "install-shell-files";
            python3Packages = python // {
              buildPythonApplication = attrs: attrs // fake attrs.pname;
            };
          }
        );
      writeShellScriptBin = name: text: fake name // { inherit text; };
      writeText = name: text: fake name // { inherit text; };
      nixos = configuration: {
        config.system.build.toplevel = fake "nixos" // {
          inherit configuration;
        };
      };
    }
    // packages;

  option =
    type: default:
    mkOption {
      inherit type default;
    };
  mandatory = type: mkOption { inherit type; };
  submodule = options: types.submodule { inherit options; };
  settings = types.attrsOf types.anything;
  agentOptions = {
    enable = option types.bool false;
    name = option types.str "web";
    profile = option (types.nullOr types.str) null;
  };

  common = {
    options = {
      assertions = option (types.listOf types.anything) [ ];
      services.cachix-agent = agentOptions;
      nix.enable = option types.bool true;
      nix.package = option types.package pkgs.nix;
    };
  };

  service = submodule {
    description = option types.str "";
    wants = option (types.listOf types.str) [ ];
    requires = option (types.listOf types.str) [ ];
    after = option (types.listOf types.str) [ ];
    wantedBy = option (types.listOf types.str) [ ];
    path = option (types.listOf types.package) [ ];
    environment = option (types.attrsOf types.str) { };
    startLimitIntervalSec = option (types.nullOr types.int) null;
    stopIfChanged = option types.bool true;
    restartIfChanged = option types.bool true;
    serviceConfig = option settings { };
  };
  location = submodule {
    proxyPass = mandatory types.str;
    proxyWebsockets = option types.bool false;
    recommendedProxySettings = option types.bool false;
    extraConfig = option types.lines "";
  };
  nixos = {
    options = {
      environment.systemPackages = option (types.listOf types.package) [ ];
      networking = {
        hostName = option types.str "web";
        proxy.envVars = option (types.attrsOf types.str) { };
        firewall.allowedTCPPorts = option (types.listOf types.port) [ ];
      };
      services.nginx = {
        enable = option types.bool false;
        virtualHosts = option (types.attrsOf (submodule {
          forceSSL = option types.bool false;
          enableACME = option types.bool false;
          locations = option (types.attrsOf location) { };
        })) { };
      };
      services.postgresql = {
        enable = option types.bool false;
        package = option types.package (fake "postgresql");
        ensureDatabases = option (types.listOf types.str) [ ];
        ensureUsers = option (types.listOf (submodule {
          name = mandatory types.str;
          ensureDBOwnership = option types.bool false;
        })) [ ];
      };
      security.acme = option settings { };
      systemd.services = option (types.attrsOf service) { };
    };
  };
  darwin = {
    options = {
      environment.etc = option (types.attrsOf (submodule { text = mandatory types.lines; })) { };
      environment.systemPackages = option (types.listOf types.package) [ ];
      environment.systemPath = option types.str "$HOME/.nix-profile/bin:/usr/bin";
      networking.hostName = option types.str "mac";
      launchd.daemons = option (types.attrsOf (submodule {
        command = mandatory types.str;
        path = option (types.listOf (types.either types.path types.str)) [ ];
        environment = option (types.attrsOf types.str) { };
        serviceConfig = option settings { };
      })) { };
    };
  };
  home = {
    options = {
      home.homeDirectory = option types.str "/home/alice";
      home.packages = option (types.listOf types.package) [ ];
      xdg.configHome = option types.str "/home/alice/.config";
      systemd.user.services = option (types.attrsOf (types.attrsOf settings)) { };
      launchd.agents = option (types.attrsOf (submodule {
        enable = option types.bool false;
        config = option settings { };
      })) { };
    };
  };

  # What the real modules of home-manager and nix-darwin want of others, of which many want all of
  # nixpkgs.
  free = option (types.submodule { freeformType = settings; }) { };
  homeManagerRest = {
    options = {
      assertions = option (types.listOf types.anything) [ ];
      home = free;
      lib = free;
      meta = free;
      nix = free;
      xdg = free;
    };
    config = {
      home.homeDirectory = "/home/alice";
      xdg.configHome = "/home/alice/.config";
      nix.enable = true;
      nix.package = pkgs.nix;
    };
  };
  darwinRest = {
    options = {
      assertions = option (types.listOf types.anything) [ ];
      environment = {
        launchAgents = option settings { };
        launchDaemons = option settings { };
        systemPackages = option (types.listOf types.package) [ ];
        systemPath = option types.str "$HOME/.nix-profile/bin:/usr/bin";
        userLaunchAgents = option settings { };
      };
      networking.hostName = option types.str "mac";
      nix.enable = option types.bool true;
      nix.package = option types.package pkgs.nix;
      system = free;
    };
  };

  evaluated =
    if kind == "darwin" && nixDarwin != "" then
      lib.evalModules {
        modules =
          modules
          ++ map (file: /. + nixDarwin + "/modules/${file}") [
            "launchd"
            "services/cachix-agent.nix"
            "system/etc.nix"
          ]
          ++ [ darwinRest ];
        specialArgs = {
          inherit pkgs;
        };
      }
    else if kind == "home-manager" && homeManager != "" then
      let
        extended = import (/. + homeManager + "/modules/lib/stdlib-extended.nix") lib;
      in
      extended.evalModules {
        modules =
          modules
          ++ map (file: /. + homeManager + "/modules/${file}") [
            "launchd"
            "services/cachix-agent.nix"
            "systemd.nix"
          ]
          ++ [ homeManagerRest ];
        specialArgs = {
          inherit pkgs;
        };
      }
    else
      lib.evalModules {
        modules = modules ++ [
          common
          {
            inherit nixos darwin;
            home-manager = home;
          }
          .${kind}
        ];
        specialArgs = {
          inherit lib pkgs;
        };
      };
  inherit (evaluated) config;

  # --- how NixOS and home-manager write units ---
  text = value:
    if builtins.isBool value then (if value then "true" else "false") else toString value;
  lines =
    set:
    lib.concatStringsSep "" (
      lib.mapAttrsToList (
        name: value:
        lib.concatStringsSep "" (
          map (one: "${name}=${text one}\n") (if builtins.isList value then value else [ value ])
        )
      ) set
    );
  section = name: set: "[${name}]\n${lines set}";
  nixosUnit =
    unit:
    let
      folders = unit.path ++ map fake [ "coreutils" "findutils" "gnugrep" "gnused" "systemd" ];
      bins = map (package: "${package}/bin") folders ++ map (package: "${package}/sbin") folders;
      environment = unit.environment // {
        PATH = lib.concatStringsSep ":" bins;
      };
    in
    lib.concatStringsSep "\n" [
      (section "Unit" (
        {
          Description = unit.description;
        }
        // lib.optionalAttrs (unit.wants != [ ]) { Wants = toString unit.wants; }
        // lib.optionalAttrs (unit.requires != [ ]) { Requires = toString unit.requires; }
        // lib.optionalAttrs (unit.after != [ ]) { After = toString unit.after; }
        // lib.optionalAttrs (unit.startLimitIntervalSec != null) {
          StartLimitIntervalSec = unit.startLimitIntervalSec;
        }
      ))
      (section "Service" (
        {
          Environment = lib.mapAttrsToList (
            name: value: builtins.toJSON "${name}=${value}"
          ) environment;
        }
        // lib.optionalAttrs (!unit.stopIfChanged) { X-StopIfChanged = false; }
        // lib.optionalAttrs (!unit.restartIfChanged) { X-RestartIfChanged = false; }
        // unit.serviceConfig
      ))
      (section "Install" { WantedBy = toString unit.wantedBy; })
    ];
  isSet = _: value: value != null && value != [ ] && value != { };
  homeUnit =
    unit:
    lib.concatStringsSep "\n" (
      lib.mapAttrsToList section (
        lib.filterAttrs isSet (builtins.mapAttrs (_: lib.filterAttrs isSet) unit)
      )
    );
  plist = lib.filterAttrs (_: value: value != null);
  # as nix-darwin does it
  daemon =
    name: daemon:
    if nixDarwin != "" then
      plist daemon.serviceConfig
    else
      daemon.serviceConfig
      // {
        Label = "org.nixos.${name}";
        ProgramArguments = [
          "/bin/sh"
          "-c"
          "/bin/wait4path /nix/store && exec ${daemon.command}"
        ];
        EnvironmentVariables = daemon.environment // {
          PATH = lib.concatMapStringsSep ":" (
            part: if builtins.isString part then part else "${part}/bin"
          ) daemon.path;
        };
      };
  homeAgent = _: agent: builtins.removeAttrs (plist agent.config) [ "Label" ];
  ours = lib.filterAttrs (name: _: lib.hasPrefix "cachix-" name);
  ourMessages = builtins.filter (
    message: lib.hasInfix "services.cachix-deploy" message || lib.hasInfix "cachix-work" message
  );
in
{
  inherit config lib pkgs;
  evaluate = {
    failed = ourMessages (
      map (one: one.message) (builtins.filter (one: !one.assertion) config.assertions)
    );
    result =
      if kind == "nixos" then
        {
          units = builtins.mapAttrs (_: nixosUnit) (ours config.systemd.services);
          ports = config.networking.firewall.allowedTCPPorts;
          nginx = config.services.nginx;
          postgresql = config.services.postgresql;
          scripts = map (package: package.text) (
            builtins.filter (package: package ? text) config.environment.systemPackages
          );
          commands = map toString config.environment.systemPackages;
        }
      else if kind == "darwin" then
        {
          plists = builtins.mapAttrs daemon (ours config.launchd.daemons);
          etc = builtins.mapAttrs (_: file: file.text) (
            lib.filterAttrs (name: _: lib.hasInfix "cachix" name) config.environment.etc
          );
          commands = map toString config.environment.systemPackages;
        }
      else
        {
          units = builtins.mapAttrs (_: homeUnit) (ours config.systemd.user.services);
          plists = builtins.mapAttrs homeAgent (ours config.launchd.agents);
          commands = map toString (config.home.packages or [ ]);
        };
  };
}

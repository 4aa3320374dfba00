# services.cachix-workspace for NixOS
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;
  cfg = config.services.cachix-workspace;
  argv = import ./argv.nix { inherit lib; };
  program = "${cfg.package}/bin/cachix-workspace";
  host = if lib.hasInfix ":" cfg.listenAddress then "[${cfg.listenAddress}]" else cfg.listenAddress;
  isPrivileged = cfg.port < 1024;

  inherit (cfg) database;
  isPostgres = database.type == "postgresql";
  # its role has the user's name: PostgreSQL asks the system who it is that comes by the socket
  localUrl = "postgresql+psycopg://${user.User}@/${user.User}?host=/run/postgresql";
  credentials = lib.optionalAttrs (isPostgres && database.urlFile != null) {
    LoadCredential = "database-url:${database.urlFile}";
  };
  postgres = config.services.postgresql.package; # its programs make backups

  # Whoever uses the data must be the user that systemd makes for the service: it also takes the
  # files of root away from root, but only when the service starts again.
  user = {
    DynamicUser = true;
    User = "cachix-workspace";
    StateDirectory = "cachix-workspace";
    StateDirectoryMode = "0700";
    UMask = "0077";
  };

  # The commands that read or change the data, beside the server.
  command = pkgs.writeShellScriptBin "cachix-workspace" ''
    case " $* " in
      "  " | *" --url"* | *" --help "* | *" -h "* | *" --version "*) exec ${program} "$@" ;;
    esac
    if [ "$(id -u)" != 0 ]; then
      echo "error: run this as root, or from afar with --url" >&2
      exit 1
    fi
    exec systemd-run --quiet --collect --wait --pipe ${
      lib.concatStringsSep " " (
        lib.mapAttrsToList (
          name: value: "--property=${name}=${if value == true then "yes" else value}"
        ) (user // credentials)
        ++ lib.optional isPostgres "--setenv=PATH=${postgres}/bin"
      )
    } -- ${program} "$@"
  '';
in
{
  options.services.cachix-workspace = {
    enable = lib.mkEnableOption "the self-hosted workspace of Cachix Deploy";
    package = lib.mkPackageOption (import ../default.nix { inherit pkgs; }) "cachix-workspace" {
      pkgsText = "(import cachix-deploy { inherit pkgs; })";
    };
    listenAddress = mkOption {
      type = types.str;
      default = "127.0.0.1";
      example = "::";
      description = "The address to listen on. Anything else than a proxy needs encryption.";
    };
    port = mkOption {
      type = types.port;
      default = 8080;
      description = "The port to listen on.";
    };
    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open the port in the firewall; with nginx those of HTTP and HTTPS.";
    };
    publicUrl = mkOption {
      type = types.nullOr types.str;
      default = if cfg.nginx.enable then "https://${cfg.nginx.domain}" else null;
      defaultText = lib.literalExpression "that of nginx.domain, else the address to listen on";
      example = "https://deploy.example.org";
      description = "The URL by which agents and CI reach the workspace.";
    };
    maxConnections = mkOption {
      type = types.ints.between 4 100000;
      default = 16000;
      description = "Connections at a time. Three quarters of them may be websockets.";
    };
    keepDeployments = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 100;
      description = "How many deployments to keep of each agent, with their logs; null for all.";
    };
    keepDays = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 365;
      description = "How many days to keep deployments; null for any number.";
    };
    database = {
      type = mkOption {
        type = types.enum [
          "sqlite"
          "postgresql"
        ];
        default = "sqlite";
        description = "SQLite is a file in the state directory. Several nodes need PostgreSQL.";
      };
      createLocally = mkOption {
        type = types.bool;
        default = isPostgres && database.urlFile == null;
        defaultText = lib.literalExpression "whether type is postgresql, without a urlFile";
        description = "Whether to make a database in this machine's PostgreSQL, by peer login.";
      };
      urlFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/run/secrets/workspace-database";
        description = ''
          A file with the URL of a database in PostgreSQL, such as
          postgresql+psycopg://USER:PASSWORD@HOST/NAME. Only the service gets to read it.
        '';
      };
    };
    nginx = {
      enable = lib.mkEnableOption "nginx in front, with a certificate by ACME unless you say else";
      domain = mkOption {
        type = types.str;
        example = "deploy.example.org";
        description = "The name of the virtual host.";
      };
    };
    extraArgs = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "--max-nar=20" ];
      description = "Further arguments of `cachix-workspace serve`.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ command ];

    assertions = [
      {
        assertion = isPostgres || !(database.createLocally || database.urlFile != null);
        message = ''
          services.cachix-workspace.database: createLocally and urlFile are for
          type = "postgresql".
        '';
      }
      {
        assertion = !isPostgres || database.createLocally == (database.urlFile == null);
        message = ''
          services.cachix-workspace.database: set either createLocally = true, or urlFile to a file
          with the URL of the database.
        '';
      }
    ];

    services.postgresql = lib.mkIf database.createLocally {
      enable = true;
      ensureDatabases = [ user.User ];
      ensureUsers = [
        {
          name = user.User;
          ensureDBOwnership = true;
        }
      ];
    };

    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall (
      if cfg.nginx.enable then
        [
          80
          443
        ]
      else
        [ cfg.port ]
    );

    services.nginx = lib.mkIf cfg.nginx.enable {
      enable = true;
      virtualHosts.${cfg.nginx.domain} = {
        forceSSL = lib.mkDefault true;
        enableACME = lib.mkDefault true;
        locations."/" = {
          proxyPass = "http://${host}:${toString cfg.port}";
          proxyWebsockets = true;
          recommendedProxySettings = true; # X-Forwarded-For, -Proto and -Host
          # NARs are large, logs and events come as they happen, and an agent may say nothing for
          # some time.
          extraConfig = ''
            client_max_body_size 0;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 300s;
          '';
        };
      };
    };

    systemd.services.cachix-workspace = {
      description = "Workspace of Cachix Deploy";
      wants = [ "network-online.target" ];
      # the target, of newer releases, also waits for the database to be made
      after = [
        "network-online.target"
      ]
      ++ lib.optionals database.createLocally [
        "postgresql.service"
        "postgresql.target"
      ];
      requires = lib.optional database.createLocally "postgresql.service";
      path = lib.optional isPostgres postgres;
      wantedBy = [ "multi-user.target" ];

      # The data is in $STATE_DIRECTORY, which systemd sets.
      serviceConfig = user // credentials // {
        Type = "exec";
        ExecStart = argv.systemd (
          [
            program
            "serve"
            "--listen=${host}:${toString cfg.port}"
            "--max-connections=${toString cfg.maxConnections}"
          ]
          ++ lib.optional (cfg.publicUrl != null) "--public-url=${cfg.publicUrl}"
          ++ lib.optional cfg.nginx.enable "--behind-proxy=1"
          ++ lib.optional (
            cfg.keepDeployments != null
          ) "--keep-deployments=${toString cfg.keepDeployments}"
          ++ lib.optional (cfg.keepDays != null) "--keep-days=${toString cfg.keepDays}"
          ++ lib.optional database.createLocally "--database=${localUrl}"
          ++ cfg.extraArgs
        );
        Restart = "on-failure";
        RestartSec = 5;
        RestartPreventExitStatus = 64; # its command line: trying again would change nothing
        TimeoutStopSec = 30;
        # `serve` would raise this by itself, but the filter below forbids setrlimit
        LimitNOFILE = cfg.maxConnections + 4096;

        AmbientCapabilities = lib.optional isPrivileged "CAP_NET_BIND_SERVICE";
        CapabilityBoundingSet = if isPrivileged then "CAP_NET_BIND_SERVICE" else "";
        DevicePolicy = "closed";
        KeyringMode = "private";
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        NoNewPrivileges = true;
        PrivateDevices = true;
        PrivateTmp = true;
        PrivateUsers = !isPrivileged;
        ProcSubset = "pid";
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        ProtectSystem = "strict";
        RemoveIPC = true;
        RestrictAddressFamilies = [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged"
          "~@resources"
        ];
      };
    };
  };
}

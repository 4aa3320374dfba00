# services.cachix-deploy for nix-darwin
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.cachix-deploy;
  argv = import ./argv.nix { inherit lib; };
  shared = import ./options.nix {
    inherit config lib pkgs;
    more.logFile = lib.mkOption {
      type = lib.types.path;
      default = "/var/log/cachix-deploy.log";
      description = "Where the agent's messages go.";
    };
  };
  logFile = toString cfg.logFile;
in
{
  options.services.cachix-deploy = shared.options;

  config = lib.mkIf cfg.enable {
    inherit (shared) assertions;

    environment.systemPackages = [ cfg.package ]; # status, rollback and check at the machine

    launchd.daemons.cachix-deploy = {
      command = lib.escapeShellArgs (argv.agent cfg ++ argv.tokenFile cfg);
      # config.environment.systemPath has `$HOME` in it, which launchd would leave as it is. Nix may
      # be managed by others (nix.enable = false): then it is in the default profile.
      path = lib.optional config.nix.enable config.nix.package ++ [
        "/nix/var/nix/profiles/default/bin"
        "/run/current-system/sw/bin"
        "/usr/bin"
        "/bin"
        "/usr/sbin"
        "/sbin"
      ];
      environment = {
        USER = "root";
        NIX_SSL_CERT_FILE = "${pkgs.cacert}/etc/ssl/certs/ca-bundle.crt";
      };
      serviceConfig = {
        RunAtLoad = true;
        KeepAlive.SuccessfulExit = false;
        ThrottleInterval = 10;
        ExitTimeOut = 20;
        ProcessType = "Interactive"; # else macOS slows down what an activation does
        WatchPaths = [ (toString cfg.credentialsFile) ];
        StandardOutPath = logFile;
        StandardErrorPath = logFile;
      };
    };

    # N: nobody is told, as the process id of an agent that is gone may be another's. An agent goes
    # on writing into the old file until it is restarted, so that must not be compressed.
    environment.etc."newsyslog.d/cachix-deploy.conf".text = ''
      # logfile owner:group mode count KB when flags
      ${logFile} root:wheel 640 5 1024 * N
    '';
  };
}

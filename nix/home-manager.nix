# services.cachix-deploy for home-manager: an agent of one user, on Linux and macOS
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.cachix-deploy;
  inherit (pkgs.stdenv.hostPlatform) isDarwin;
  argv = import ./argv.nix { inherit lib; };
  shared = import ./options.nix {
    inherit config lib pkgs;
    defaultCredentialsFile = "${config.xdg.configHome}/cachix-agent.token";
    # `alice@laptop` gets this far, so that the assertion below can say what to write instead.
    nameOption = lib.mkOption {
      type = lib.types.strMatching "[0-9A-Za-z][0-9A-Za-z._@-]{0,127}";
      example = "alice-laptop";
      description = "The name of the agent.";
    };
    more.logFile = lib.mkOption {
      type = lib.types.path;
      default = "${config.home.homeDirectory}/Library/Logs/cachix-deploy.log";
      defaultText = lib.literalExpression ''
        "''${config.home.homeDirectory}/Library/Logs/cachix-deploy.log"
      '';
      description = "Where the agent's messages go on macOS.";
    };
  };
  nix = config.nix.package or null;
  path = lib.concatStringsSep ":" (
    [ "${if nix == null then pkgs.nix else nix}/bin" ]
    ++ [
      "/nix/var/nix/profiles/default/bin"
      "/run/current-system/sw/bin"
      "/usr/bin"
      "/bin"
      "/usr/sbin"
      "/sbin"
    ]
  );
  command = argv.agent cfg ++ argv.tokenFile cfg;
in
{
  options.services.cachix-deploy = shared.options;

  config = lib.mkIf cfg.enable (
    lib.mkMerge [
      {
        home.packages = [ cfg.package ]; # status, rollback and check at the machine
        assertions = shared.assertions ++ [
          {
            assertion = builtins.match argv.name cfg.name != null;
            message = ''
              services.cachix-deploy.name can't have an "@": name the agent
              "${lib.replaceStrings [ "@" ] [ "-" ] cfg.name}", for example.
            '';
          }
        ];
      }

      (lib.mkIf (!isDarwin) {
        # As for NixOS there is no sandboxing: an activation would inherit it.
        systemd.user.services.cachix-deploy = {
          Unit = {
            Description = "Deployment agent";
            StartLimitIntervalSec = 0; # each of several deployments in a row may restart it
          };
          Service = {
            Type = "exec";
            Environment = [ "PATH=${path}" ];
            ExecStart = argv.systemd command;
            Restart = "on-failure";
            RestartSec = 5;
            RestartSteps = 6;
            RestartMaxDelaySec = 300;
            RestartPreventExitStatus = 64; # its command line: trying again would change nothing
            TimeoutStopSec = 20;
          };
          Install.WantedBy = [ "default.target" ];
        };
      })

      (lib.mkIf isDarwin {
        launchd.agents.cachix-deploy = {
          enable = true;
          config = {
            ProgramArguments = command;
            EnvironmentVariables.PATH = path;
            RunAtLoad = true;
            KeepAlive.SuccessfulExit = false;
            ThrottleInterval = 10;
            ExitTimeOut = 20;
            ProcessType = "Interactive"; # else macOS slows down what an activation does
            WatchPaths = [ (toString cfg.credentialsFile) ];
            StandardOutPath = toString cfg.logFile;
            StandardErrorPath = toString cfg.logFile;
          };
        };
      })
    ]
  );
}

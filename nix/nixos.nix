# services.cachix-deploy for NixOS
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.cachix-deploy;
  argv = import ./argv.nix { inherit lib; };
  shared = import ./options.nix { inherit config lib pkgs; };
in
{
  options.services.cachix-deploy = shared.options;

  config = lib.mkIf cfg.enable {
    inherit (shared) assertions;

    environment.systemPackages = [ cfg.package ]; # status, rollback and check at the machine

    systemd.services.cachix-deploy = {
      description = "Deployment agent";
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      wantedBy = [ "multi-user.target" ];
      path = [ config.nix.package ];
      environment = config.networking.proxy.envVars // {
        USER = "root";
        NIX_SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
      };

      startLimitIntervalSec = 0; # each of several deployments in a row may restart it
      stopIfChanged = false; # a system that changes it restarts it at once, with the new unit

      # There is no sandboxing here, no UMask and no PrivateTmp. The scope in which a system is
      # activated inherits all of them: with /etc read-only, NoNewPrivileges or a umask of 0077 an
      # activation half fails, in silence.
      # There is no `conflicts` with cachix-agent.service either: whichever of the two a deployment
      # starts would end the one that runs it.
      serviceConfig = {
        Type = "exec";
        ExecStart = argv.systemd (argv.agent cfg);
        LoadCredential = "CACHIX_AGENT_TOKEN:${toString cfg.credentialsFile}";
        StateDirectory = "cachix-deploy";
        StateDirectoryMode = "0700";
        Restart = "on-failure";
        RestartSec = 5;
        RestartSteps = 6;
        RestartMaxDelaySec = 300;
        RestartPreventExitStatus = 64; # its command line: trying again would change nothing
        TimeoutStopSec = 20;
      };
    };
  };
}

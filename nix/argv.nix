# The command line of an agent, from its options, and how service managers want it written.
{ lib }:

let
  # Within double quotes systemd knows the escapes of JSON. `%` and `$` mean something everywhere.
  quote = word: lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON "${word}");
in
{
  agent =
    cfg:
    [
      "${cfg.package}/bin/cachix-deploy"
      "--confirm-timeout=${toString cfg.confirmTimeout}"
      "--activation-timeout=${toString cfg.activationTimeout}"
      "--on-unit-failure=${cfg.onUnitFailure}"
      "--on-reboot-needed=${cfg.onRebootNeeded}"
    ]
    ++ lib.optional cfg.verbose "--verbose"
    ++ lib.optional (!cfg.insecure) "--require-tls"
    ++ lib.optional (cfg.host != null) "--host=${cfg.host}"
    ++ map (key: "--trusted-key=${key}") cfg.trustedKeys
    ++ map (key: "--deployment-key=${key}") cfg.deploymentKeys
    ++ lib.optional (cfg.rebootWindow != null) "--reboot-window=${cfg.rebootWindow}"
    ++ lib.optional (cfg.postDeploy != null) "--post-deploy=${cfg.postDeploy}"
    ++ lib.optional (cfg.metricsFile != null) "--metrics-file=${toString cfg.metricsFile}"
    ++ cfg.extraArgs
    ++ [
      "agent"
      cfg.name
    ]
    ++ lib.optional (cfg.profile != null) cfg.profile;

  # where no service manager hands the token over; `toString` copies nothing into the store
  tokenFile = cfg: [ "--token-file=${toString cfg.credentialsFile}" ];

  name = "[0-9A-Za-z][0-9A-Za-z._-]{0,127}";

  systemd = lib.concatMapStringsSep " " quote;
}

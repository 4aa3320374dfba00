# The options of services.cachix-deploy in all three module systems, and what is asserted of them.
{
  config,
  lib,
  pkgs,
  defaultCredentialsFile ? "/etc/cachix-agent.token",
  # by default the host's name
  nameOption ? lib.mkOption {
    type = lib.types.strMatching (import ./argv.nix { inherit lib; }).name;
    default = config.networking.hostName;
    defaultText = lib.literalExpression "config.networking.hostName";
    description = "The name of the agent. It must be set where networking.hostName is not.";
  },
  # what a module of one system alone adds
  more ? { },
}:

let
  inherit (lib) mkOption types;
  cfg = config.services.cachix-deploy;
  cachix = config.services.cachix-agent or { enable = false; };
  number =
    default: description:
    mkOption {
      type = types.ints.positive;
      inherit default description;
    };
  keys =
    description:
    mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "main-1:ao0FIIJsQVqa2EvZoCSGIcWHtNHAyYOL9j2Gyya1eOU=" ];
      inherit description;
    };
in
{
  options = {
    enable = lib.mkEnableOption "the agent of Cachix Deploy, the open implementation";
    package = lib.mkPackageOption (import ../default.nix { inherit pkgs; }) "cachix-deploy" {
      pkgsText = "(import cachix-deploy { inherit pkgs; })";
    };
    name = nameOption;
    profile = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "The profile to deploy to. By default that of the deployed kind.";
    };
    host = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "https://deploy.example.org";
      description = "The URL of the workspace. By default that of Cachix.";
    };
    credentialsFile = mkOption {
      type = types.path;
      default = defaultCredentialsFile;
      description = ''
        A file that holds the agent's token, or lines such as `CACHIX_AGENT_TOKEN=...`. It must not
        be in the Nix store, which all users can read: write the path as a string.
      '';
    };
    verbose = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to print debugging messages.";
    };
    confirmTimeout = number 120 ''
      Seconds for a new system to reach the workspace again. After that it is rolled back.
    '';
    activationTimeout = number 3600 "Seconds for an activation, and for a rollback script.";
    onUnitFailure = mkOption {
      type = types.enum [
        "rollback"
        "tolerate"
      ];
      default = "rollback";
      description = "The policy for a new NixOS system of which some units failed.";
    };
    onRebootNeeded = mkOption {
      type = types.enum [
        "fail"
        "boot"
      ];
      default = "fail";
      description = "The policy for a NixOS system that can't be switched to, only booted.";
    };
    trustedKeys = keys ''
      Take the workspace's systems only if they are signed by one of these keys, whatever key the
      workspace names.
    '';
    deploymentKeys = keys "Run only deployments that one of these keys has signed.";
    rebootWindow = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "Mon..Fri 02:00-04:00";
      description = ''
        Times, by the machine's clock, in which a deployment that asks for it may reboot the
        machine. Several days are separated by commas.
      '';
    };
    postDeploy = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/etc/deployed.sh";
      description = "A program that runs once after each deployment has ended, however it has.";
    };
    metricsFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/var/lib/node-exporter/cachix-deploy.prom";
      description = "A file for metrics, which node_exporter's textfile collector reads.";
    };
    insecure = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the workspace may be plain http on another machine. Anybody on the way can read the
        token then, and change deployments.
      '';
    };
    extraArgs = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "--unsigned-rollback=0" ];
      description = "Further arguments of `cachix-deploy agent`.";
    };
  }
  // more;

  assertions = [
    {
      assertion = !lib.hasPrefix "${builtins.storeDir}/" (toString cfg.credentialsFile);
      message = ''
        services.cachix-deploy.credentialsFile is in the Nix store, where everybody can read it.
        Write the path of a file outside of it, as a string.
      '';
    }
    {
      assertion = !(cachix.enable && cachix.name == cfg.name);
      message = ''
        services.cachix-agent and services.cachix-deploy are both named "${cfg.name}". Two agents of
        one name take each other's place: disable one of them, or give it another name.
      '';
    }
  ];
}

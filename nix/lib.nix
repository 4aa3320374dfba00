# For the pkgs of a system: what CI builds, and the deploy.json that names it. The functions are
# those of cachix-deploy-flake.
{
  agent, # the modules of the agent: nixos, darwin, homeManager
  darwin ? null,
  home-manager ? null,
}:
pkgs:

let
  inherit (pkgs) lib;
  known = [
    "agents"
    "rollbackScript"
  ];
  isAgentName = name: builtins.match (import ./argv.nix { inherit lib; }).name name != null;
  isStorePath = value: lib.hasPrefix "${builtins.storeDir}/" "${value}";
  wrong =
    what: names: lib.optional (names != [ ]) "${what}: ${lib.concatStringsSep ", " names}";
  needs =
    name: input:
    if input == null then
      throw "cachix-deploy.lib: set inputs.cachix-deploy.inputs.${name}.follows in your flake"
    else
      input;
in
{
  # `agents` has the systems by the names of agents, `rollbackScript` scripts by platforms.
  spec =
    {
      agents,
      rollbackScript ? { },
      ...
    }@spec:
    let
      paths = agents // rollbackScript;
      problems =
        wrong "unknown keys" (lib.subtractLists known (builtins.attrNames spec))
        ++ wrong "agents can't have these names" (
          builtins.filter (name: !isAgentName name) (builtins.attrNames agents)
        )
        ++ wrong "no store paths" (
          builtins.filter (name: !isStorePath paths.${name}) (builtins.attrNames paths)
        );
    in
    if problems != [ ] then
      throw "cachix-deploy.lib.spec: ${lib.concatStringsSep "; " problems}"
    else
      pkgs.writeText "deploy.json" (builtins.toJSON spec);

  # the system of a NixOS machine
  nixos =
    module:
    (pkgs.nixos {
      imports = [
        agent.nixos
        module
      ];
    }).config.system.build.toplevel;

  # the system of a nix-darwin machine
  darwin =
    module:
    ((needs "darwin" darwin).lib.darwinSystem {
      inherit pkgs;
      modules = [
        agent.darwin
        module
      ];
    }).system;

  # the generation of a user of home-manager
  homeManager =
    {
      extraSpecialArgs ? { },
    }:
    module:
    ((needs "home-manager" home-manager).lib.homeManagerConfiguration {
      inherit pkgs extraSpecialArgs;
      modules = [
        agent.homeManager
        module
      ];
    }).config.home.activationPackage;
}

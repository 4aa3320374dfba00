# The program of agents and CI. `cachix` and `cachix-workspace` are attributes of it:
# nix-env -f . -iA cachix-workspace
{
  pkgs ? import <nixpkgs> { },
}:

let
  package = program: pkgs.callPackage ./nix/package.nix { inherit program; };
in
package "cachix-deploy"
// {
  cachix-deploy = package "cachix-deploy";
  cachix = package "cachix";
  cachix-workspace = package "cachix-workspace";
}

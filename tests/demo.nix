# A minimal system: a few store paths that refer to one another, one of them marked as NixOS.
{ version, switch }:
let
  make = name: script: more: derivation ({
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/usr/bin:/bin";
  } // more);

  server = make "web-server-${version}" ''
    mkdir -p $out/bin
    printf '#!/bin/sh\necho "web server ${version}"\n' >$out/bin/web-server
    chmod +x $out/bin/web-server
  '' { };

  units = make "units-${version}" ''
    mkdir $out
    echo "ExecStart=$server/bin/web-server" >$out/web.service
  '' { inherit server; };
in
{
  system = make "nixos-system-web1-${version}" ''
    mkdir -p $out/bin $out/sw
    echo "24.11.${version}" >$out/nixos-version
    ln -s $units $out/units
    ln -s $server/bin $out/sw/bin
    sed "s|@self@|$out|g" $switch >$out/bin/switch-to-configuration
    chmod +x $out/bin/switch-to-configuration
  '' { inherit server units switch; };

  healthCheck = make "health-check" ''
    printf '#!/bin/sh\necho "health check: the new web server does not answer"\nexit 1\n' >$out
    chmod +x $out
  '' { };
}

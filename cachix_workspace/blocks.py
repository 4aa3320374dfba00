"""Blocks to paste that start an agent, or let CI deploy: complete, with all values filled in.

A token is never part of a block that stays in a shell's history or in a file: it is pasted into
`cat`, whose input no shell keeps. The one exception says so: the line that ends with its shell.
"""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass

TOKEN_FILE = "/etc/cachix-agent.token"
PROGRAM = "/usr/local/bin/cachix-deploy"
PASTE = "…"  # stands for a token that is not shown any more


@dataclass(frozen=True)
class Facts:
    """Values of a block: an agent's name, the workspace's URL, the program's SHA-256, a token."""

    name: str
    url: str
    sha256: str
    token: str = ""

    @property
    def hash(self) -> str:
        """The program's hash as Nix writes it."""
        return f"sha256-{base64.b64encode(bytes.fromhex(self.sha256)).decode()}"


@dataclass(frozen=True)
class Step:
    """A part to paste, and what is said before it. `note` follows it."""

    id: str
    say: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Way:
    """A way to run an agent: its id, its title, and the steps."""

    id: str
    title: str
    steps: tuple[Step, ...]


def ways(facts: Facts) -> list[Way]:
    """All ways to run an agent."""
    return [
        Way("try", "Try it now (ends with this shell)", (_try(facts),)),
        Way("systemd", "systemd", (_get(facts, "systemd"), _token("systemd"), _systemd(facts))),
        Way("nixos", "NixOS", (_token("nixos"), _nixos(facts))),
        Way("darwin", "nix-darwin", (_token("darwin"), _darwin(facts))),
        Way("home", "home-manager", (_home_token(), _home(facts))),
        Way("cron", "cron", (_get(facts, "cron"), _token("cron"), _cron(facts))),
        Way("fresh", "A fresh NixOS machine", (_fresh(facts),)),
    ]


def _download(facts: Facts, target: str) -> str:
    return (
        f"curl -fsS -o {target} {facts.url}/get/cachix-deploy.pyz\n"
        f"echo '{facts.sha256}  {target}' | sha256sum -c - && chmod 755 {target}"
    )


def _try(facts: Facts, more: str = "") -> Step:
    token = facts.token or PASTE
    line = f"CACHIX_AGENT_TOKEN={token} ./cachix deploy agent {facts.name} --host={facts.url}{more}"
    say = "As root, on a machine with Nix and Python 3.9 or newer:"
    return Step("try-now", say, f"{_download(facts, 'cachix')}\n{line}")


def _get(facts: Facts, way: str) -> Step:
    text = f"{_download(facts, PROGRAM + '.new')} \\\n  && mv {PROGRAM}.new {PROGRAM}"
    return Step(f"{way}-get", "As root, get the program:", text)


def _token(way: str) -> Step:
    say = "As root, write the token into a file:"
    note = "Paste the token, then press Enter and Ctrl-D."
    return Step(f"{way}-token", say, f"(umask 077; cat > {TOKEN_FILE})", note)


def _home_token() -> Step:
    say = "Write the token into a file:"
    text = "mkdir -p ~/.config && (umask 077; cat > ~/.config/cachix-agent.token)"
    return Step("home-token", say, text, "Paste the token, then press Enter and Ctrl-D.")


def unit(facts: Facts) -> str:
    """The unit of an agent for systemd."""
    return f"""\
[Unit]
Description=Deployment agent
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={PROGRAM} agent {facts.name} --host={facts.url}
LoadCredential=CACHIX_AGENT_TOKEN:{TOKEN_FILE}
StateDirectory=cachix-deploy
StateDirectoryMode=0700
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=64
TimeoutStopSec=20

[Install]
WantedBy=multi-user.target"""


def _systemd(facts: Facts) -> Step:
    text = (
        f"cat > /etc/systemd/system/cachix-deploy.service <<'EOF'\n{unit(facts)}\nEOF\n"
        "systemctl daemon-reload && systemctl enable --now cachix-deploy"
    )
    return Step("systemd-start", "As root, start it now and at each boot:", text)


def _fetch(facts: Facts) -> str:
    return f"""\
  program = pkgs.fetchurl {{
    url = "{facts.url}/get/cachix-deploy.pyz";
    hash = "{facts.hash}";
  }};"""


def _nixos(facts: Facts) -> Step:
    text = f"""\
{{ config, pkgs, ... }}:
let
{_fetch(facts)}
in
{{
  systemd.services.cachix-deploy = {{
    description = "Deployment agent";
    after = [ "network-online.target" ];
    wants = [ "network-online.target" ];
    wantedBy = [ "multi-user.target" ];
    path = [ config.nix.package ];
    environment.USER = "root";
    startLimitIntervalSec = 0;
    stopIfChanged = false;
    serviceConfig = {{
      ExecStart = "${{pkgs.python3}}/bin/python3 ${{program}} agent {facts.name} "
        + "--host={facts.url}";
      LoadCredential = "CACHIX_AGENT_TOKEN:{TOKEN_FILE}";
      StateDirectory = "cachix-deploy";
      StateDirectoryMode = "0700";
      Restart = "on-failure";
      RestartSec = 5;
      RestartPreventExitStatus = 64;
      TimeoutStopSec = 20;
    }};
  }};
}}"""
    note = "Every system that is deployed to the machine must have it too."
    return Step("nixos-module", "Add this module to the system, and switch to it:", text, note)


def _darwin(facts: Facts) -> Step:
    text = f"""\
{{ config, pkgs, ... }}:
let
{_fetch(facts)}
in
{{
  launchd.daemons.cachix-deploy = {{
    path = [ config.nix.package ];
    serviceConfig = {{
      ProgramArguments = [
        "${{pkgs.python3}}/bin/python3" "${{program}}" "agent" "{facts.name}"
        "--host={facts.url}" "--token-file={TOKEN_FILE}"
      ];
      KeepAlive.SuccessfulExit = false;
      RunAtLoad = true;
      ThrottleInterval = 10;
      ExitTimeOut = 20;
      ProcessType = "Interactive";
      StandardErrorPath = "/var/log/cachix-deploy.log";
    }};
  }};
}}"""
    note = "This was written by its documentation, and not tried on macOS."
    return Step("darwin-module", "Add this module to the system, and switch to it:", text, note)


def _home(facts: Facts) -> Step:
    text = f"""\
{{ config, pkgs, ... }}:
let
{_fetch(facts)}
  token = "${{config.xdg.configHome}}/cachix-agent.token";
in
{{
  systemd.user.services.cachix-deploy = {{
    Unit.Description = "Deployment agent";
    Unit.StartLimitIntervalSec = 0;
    Service = {{
      ExecStart = "${{pkgs.python3}}/bin/python3 ${{program}} agent {facts.name} "
        + "--host={facts.url} --token-file=${{token}}";
      Environment = "PATH=${{pkgs.nix}}/bin:/run/current-system/sw/bin:/usr/bin:/bin";
      Restart = "on-failure";
      RestartSec = 5;
    }};
    Install.WantedBy = [ "default.target" ];
  }};
}}"""
    note = "`loginctl enable-linger` lets it run while you are not logged in."
    return Step(
        "home-module", "Add this module to the configuration, and switch to it:", text, note
    )


def _cron(facts: Facts) -> Step:
    text = f"""\
PATH=/usr/local/bin:/usr/bin:/bin
HOST={facts.url}
TOKEN={TOKEN_FILE}
* * * * *  cachix-deploy agent {facts.name} --if-stopped --host=$HOST --token-file=$TOKEN"""
    return Step("cron-lines", "Add these lines with `crontab -e` as root:", text)


def _fresh(facts: Facts) -> Step:
    step = _try(facts, " --bootstrap")
    say = (
        "The machine is deployed to once, and then the agent of the deployed system takes over. "
        "Deploy a system that has an agent (see NixOS), and as root on the machine:"
    )
    return Step("fresh-once", say, step.text)


# --- CI -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CiFacts:
    """The values of the blocks for CI: the workspace's URL, and the program's SHA-256."""

    url: str
    sha256: str


SECRETS = ("CACHIX_ACTIVATE_TOKEN", "CACHIX_SIGNING_KEY")
FLAKE = """\
# flake.nix: what `nix build .#deploy` makes, for agents by their names
packages.x86_64-linux.deploy = pkgs.writeText "deploy.json" (builtins.toJSON {
  agents.web = self.nixosConfigurations.web.config.system.build.toplevel;
});"""


def push_line(url: str, path: str, cache: str = "") -> str:
    """The command that pushes a path to a cache, with SECRETS in the environment."""
    more = f" --cache={cache}" if cache else ""
    return f"cachix-deploy push {shlex.quote(path)} --host={url}{more}"


def _ci_script(facts: CiFacts, indent: str) -> str:
    lines = [
        f"curl -fsS -o /tmp/cachix-deploy {facts.url}/get/cachix-deploy.pyz",
        f"echo '{facts.sha256}  /tmp/cachix-deploy' | sha256sum -c -",
        "nix build .#deploy",
        "python3 /tmp/cachix-deploy activate --push result",
    ]
    return "\n".join(indent + line for line in lines)


def github(facts: CiFacts) -> str:
    """A workflow for GitHub Actions."""
    secrets = "\n".join(f"          {name}: ${{{{ secrets.{name} }}}}" for name in SECRETS)
    return f"""\
name: deploy
on:
  push:
    branches: [main]
jobs:
  deploy:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: cachix/install-nix-action@v31
      - env:
          CACHIX_HOST: {facts.url}
{secrets}
        run: |
{_ci_script(facts, "          ")}"""


def gitlab(facts: CiFacts) -> str:
    """A job for GitLab CI, whose settings have SECRETS as variables."""
    script = _ci_script(facts, "      ")
    return f"""\
deploy:
  image: nixos/nix
  rules:
    - if: $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH
  variables:
    CACHIX_HOST: {facts.url}
  script:
    - |
      export NIX_CONFIG='experimental-features = nix-command flakes'
      nix profile install nixpkgs#python3 nixpkgs#curl
{script}"""

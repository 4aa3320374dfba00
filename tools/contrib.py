"""Write the files in contrib/ that start an agent, or let CI deploy, from the workspace's blocks.

`make manuals` calls it. They serve where no page of a workspace is at hand.
"""

from __future__ import annotations

import plistlib
import re
import sys
from pathlib import Path

from cachix_workspace import blocks
from cachix_workspace.blocks import CiFacts, Facts

ROOT = Path(__file__).resolve().parent.parent
HASH = "0" * 64
FACTS = Facts("web", "https://deploy.example.org", HASH)
NAMES = f"Replace `{FACTS.name}` and {FACTS.url}."
UNTRIED = "Written by the documentation of {}, and not tried."


def head(*sentences: str, mark: str = "#") -> str:
    """Lines of comments, and an empty one."""
    return "".join(f"{mark} {sentence}\n" for sentence in sentences) + "\n"


def system_unit() -> str:
    """The unit of a machine's agent."""
    token = f"The token is in {blocks.TOKEN_FILE}, which only root can read."
    where = "To /etc/systemd/system/cachix-deploy.service, then `systemctl enable --now` it."
    return head(where, NAMES, token) + blocks.unit(FACTS) + "\n"


def user_unit() -> str:
    """The unit of a user's agent, for home-manager: the system's, where it is not root's."""
    text = blocks.unit(FACTS)
    command = f"%h/.local/bin/cachix-deploy agent {FACTS.name} --host={FACTS.url}"
    for pattern, value in (
        (r"(After|Wants)=.*\n", ""),  # a user's systemd knows no such target
        (r"ExecStart=.*", f"ExecStart={command} --token-file=%h/.config/cachix-agent.token"),
        (r"LoadCredential=.*\n", "Environment=PATH=/run/current-system/sw/bin:/usr/bin:/bin\n"),
        (r"StateDirectory\w*=.*\n", ""),
        (r"WantedBy=.*", "WantedBy=default.target"),
    ):
        text, count = re.subn(pattern, value, text)
        assert count, pattern
    where = "To ~/.config/systemd/user/cachix-deploy.service, then `systemctl --user enable --now`"
    linger = "it. `loginctl enable-linger` lets it run while you are not logged in."
    return head(where, linger, NAMES) + text + "\n"


def arguments() -> list[str]:
    """The command line of an agent that reads its token from a file."""
    command = re.search(r"ExecStart=(.*)", blocks.unit(FACTS))
    assert command
    return [*command[1].split(), f"--token-file={blocks.TOKEN_FILE}"]


def plist() -> str:
    """The daemon of a Mac."""
    values = {
        "Label": "org.cachix-deploy.agent",
        "ProgramArguments": arguments(),
        "EnvironmentVariables": {
            "PATH": "/nix/var/nix/profiles/default/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        },
        "KeepAlive": {"SuccessfulExit": False},
        "RunAtLoad": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 20,
        "ProcessType": "Interactive",
        "WatchPaths": [blocks.TOKEN_FILE],
        "StandardErrorPath": "/var/log/cachix-deploy.log",
    }
    text = plistlib.dumps(values, sort_keys=False).decode()
    first, _, rest = text.partition("\n")
    where = "To /Library/LaunchDaemons, then `launchctl bootstrap system FILE`."
    lines = "\n     ".join((UNTRIED.format("launchd"), where, NAMES))
    return f"{first}\n<!-- {lines} -->\n{rest}"


def cron() -> str:
    """The lines of cron."""
    (way,) = [way for way in blocks.ways(FACTS) if way.id == "cron"]
    return head("For `crontab -e` as root.", NAMES) + way.steps[-1].text + "\n"


def openrc() -> str:
    """The script of OpenRC."""
    program, *rest = arguments()
    about = "To /etc/init.d/cachix-deploy, mode 755, then `rc-update add cachix-deploy`."
    return (
        "#!/sbin/openrc-run\n"
        + head(UNTRIED.format("OpenRC"), about, NAMES)
        + (
            'description="Deployment agent"\n'
            "supervisor=supervise-daemon\n"
            f'command="{program}"\n'
            f'command_args="{" ".join(rest)}"\n'
            "respawn_delay=5\n"
            "respawn_max=0\n"
            'retry="TERM/20/KILL/5"\n'
            'error_log="/var/log/cachix-deploy.log"\n'
            "\n"
            "depend() {\n"
            "\tneed net\n"
            "}\n"
        )
    )


def ci(text: str) -> str:
    """A file for CI."""
    fill = "The page of a cache has this text with the workspace's values: the URL, and the SHA-256"
    return head(fill, f"of {FACTS.url}/get/cachix-deploy.pyz in place of zeros.") + text + "\n"


def files() -> dict[Path, str]:
    """All files, with their contents."""
    facts = CiFacts(FACTS.url, HASH)
    contents = {
        "systemd/cachix-deploy.service": system_unit(),
        "systemd/user/cachix-deploy.service": user_unit(),
        "launchd/org.cachix-deploy.agent.plist": plist(),
        "cron/cachix-deploy": cron(),
        "openrc/cachix-deploy": openrc(),
        "ci/github.yml": ci(blocks.github(facts)),
        "ci/gitlab.yml": ci(blocks.gitlab(facts)),
    }
    return {ROOT / "contrib" / name: text for name, text in contents.items()}


def main() -> int:
    """Write the files."""
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

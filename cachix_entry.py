"""The start of the program. Commands that must answer at once begin before all else is loaded."""

from __future__ import annotations

import gc
import os
import re
import sys
from typing import Optional

ALONE = "deploy"  # the subcommand of Cachix's client, which we need not be called by
IF_STOPPED = "--if-stopped"
# Options of an agent with their values, such as stand in a line of cron.
VALUED = re.compile(
    "--(host|hostname|config|token-file|trusted-key|deployment-key|unsigned-rollback"
    "|confirm-timeout|activation-timeout|on-unit-failure|on-reboot-needed|reboot-window"
    "|post-deploy|metrics-file)=.+",
    re.DOTALL,
)
NAME = re.compile("[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


def main(argv: Optional[list[str]] = None) -> int:
    """Run a command line and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    status = answer(words)
    if status is not None:
        return status
    import cachix_deploy

    gc.freeze()
    gc.enable()
    return cachix_deploy.main(argv)


def answer(words: list[str]) -> Optional[int]:
    """The exit status of a command line that is answered at once; None for all others."""
    gc.disable()  # for the imports: none of that is garbage, nor will be
    if is_status(words):
        import cachix_status
        from activate import startup

        startup.open_descriptors()
        return cachix_status.status_command("--json" in words)
    return 0 if is_running(words) else None


def is_status(words: list[str]) -> bool:
    """Whether a command line is `status`, or `status --json`, in its plain form."""
    through_cachix = os.path.basename(sys.argv[0]) == "cachix"
    rest = words[1:] if words[:1] == [ALONE] else [] if through_cachix else words
    return rest in (["status"], ["status", "--json"])


def is_running(words: list[str]) -> bool:
    """Whether this is `agent --if-stopped` in a plain form, and an agent of the name runs.

    Cron asks each minute. For anything else, a wrong option too, the whole program sees to it.
    """
    name = agent_named(words)
    if name is None:
        return False
    from activate import environment, lock
    from activate.agent import single

    try:
        environment.leave_others()
        if lock.foreign(lock.shared_path("agent", name)):
            return False
        return single.owner(environment.state_directory(), name) is not None
    except (OSError, environment.NoHome):
        return False


def agent_named(words: list[str]) -> Optional[str]:
    """The name on a command line `agent [NAME] [PROFILE] --if-stopped` in a plain form."""
    rest = words[1:] if words[:1] == [ALONE] else words
    if "agent" not in rest or IF_STOPPED not in rest:
        return None
    names = [word for word in rest if word != IF_STOPPED and not VALUED.fullmatch(word)]
    if names[:1] != ["agent"] or len(names) > 3 or not all(map(NAME.fullmatch, names)):
        return None
    return names[1] if len(names) > 1 else os.uname().nodename.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())

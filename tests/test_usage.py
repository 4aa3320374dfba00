"""cachix_usage.py: the part of a usage text gives what the whole one does, only sooner."""

from typing import Any, Optional

import docopt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cachix_options
import cachix_usage
from cachix_workspace.cli import usage as workspace

AGENT, WORKSPACE = cachix_options.USAGE, workspace.USAGE
LINES = [
    (AGENT, "agent"),
    (AGENT, "deploy agent web system --bootstrap --host=x"),
    (AGENT, "agent status"),
    (AGENT, "agent -v -c f --trusted-key=a --trusted-key=b"),
    (AGENT, "status --json"),
    (AGENT, "doctor"),
    (AGENT, "rollback --to=3 --cancel"),
    (AGENT, "activate a b --agent=x -a y --async --on-unit-failure=tolerate"),
    (AGENT, "push a --upstream=none"),
    (AGENT, "key create a b"),
    (WORKSPACE, "serve --listen=a --also-known-as=b"),
    (WORKSPACE, "token create agent --name=x"),
    (WORKSPACE, "agent label a b c"),
    (WORKSPACE, "cache gc main --dry-run"),
    (WORKSPACE, "restore d --data=e"),
]
REFUSED = [(AGENT, "agent a b c"), (AGENT, "key"), (AGENT, "push"), (WORKSPACE, "token create")]
# Another command's option, which would else be the prefix of one that is left; a name that only
# another command makes a list of; no command.
WHOLE = [
    (AGENT, "agent --to=x"),
    (AGENT, "agent --on=x"),
    (AGENT, "agent -a x"),
    (AGENT, "activate-local p --agent=x"),
    (AGENT, "--version"),
    (AGENT, "agent --help"),
    (AGENT, "agent -vh"),
    (AGENT, "deploy"),
    (WORKSPACE, "serve --shared"),
]
OPTIONS = ["--host=x", "--agent=y", "--json", "--to=z", "--on=z", "-v", "--batch=1", "--"]
COMMANDS = [*cachix_options.COMMANDS, "deploy", "create", "web"]


def parsed(text: str, words: list[str]) -> Optional[dict[str, Any]]:
    """What docopt makes of a command line; None if it refuses it."""
    try:
        return dict(docopt.docopt(text, argv=words))
    except docopt.DocoptExit:
        return None


@pytest.mark.parametrize(("usage", "line"), LINES)
def test_a_part_gives_what_the_whole_does(usage, line):
    part = cachix_usage.narrowed(usage, line.split())
    assert part is not None and len(part[0]) < len(usage)
    assert {**part[1], **parsed(part[0], line.split())} == parsed(usage, line.split())


@pytest.mark.parametrize(("usage", "line"), REFUSED)
def test_a_part_refuses_what_the_whole_does(usage, line):
    part = cachix_usage.narrowed(usage, line.split())
    assert part is not None and parsed(part[0], line.split()) is None


@pytest.mark.parametrize(("usage", "line"), WHOLE)
def test_some_command_lines_need_the_whole(usage, line):
    assert cachix_usage.narrowed(usage, line.split()) is None


@given(st.lists(st.sampled_from([*OPTIONS, *COMMANDS]), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_command_line(words):
    part = cachix_usage.narrowed(AGENT, words)
    if part is not None:
        values = parsed(part[0], words)
        assert (None if values is None else {**part[1], **values}) == parsed(AGENT, words)

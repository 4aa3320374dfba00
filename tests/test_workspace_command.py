"""The command line of the workspace, and what it takes from cachix_console."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workspace_support import DEADLINE, ROOT, command, environment

from cachix_console import normalize
from cachix_protocol import UsageError, checked_url
from cachix_workspace.__main__ import main
from cachix_workspace.cli.usage import USAGE, parse

Captured = pytest.CaptureFixture[str]
SECRET = "agent-S3CRET"
WORDS_OF_GROUPS = (
    "serve init login-link person token agent deployment run freeze thaw webhook cache"
)
NAMES = [*WORDS_OF_GROUPS.split(), "audit", "prune", "backup", "restore", "migrate-database"]
THERE_ARE = f"there are: {', '.join(NAMES)}: see --help"
GROUPS = f"{', '.join(NAMES[:-1])} or migrate-database"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return f"--data={tmp_path / 'data'}"


def test_help_and_version() -> None:
    for arguments in (["--help"], ["serve", "-h"]):
        assert command(*arguments).stdout == USAGE
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", command("--version").stdout)
    argv = [sys.executable, "-OO", "-m", "cachix_workspace", "--help"]
    process = subprocess.run(
        argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, timeout=DEADLINE, check=True
    )
    assert process.stdout.decode() == USAGE


def test_the_usage_fits_a_terminal_and_lists_each_option() -> None:
    assert all(len(line) <= 100 for line in USAGE.splitlines())
    listed = re.findall(r"^  (?:-h )?(--[a-z-]+)", USAGE, re.MULTILINE)
    assert sorted(listed) == sorted(set(re.findall(r"--[a-z-]+", USAGE)))


# --- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["serve", "--lis=127.0.0.1:1"], "there is no option --lis: see --help"),
        (["serve", "--listen"], "--listen requires argument: see --help"),
        (["serve", "--listen=x"], "--listen must be HOST:PORT such as 127.0.0.1:8080, not 'x'"),
        (
            ["serve", "--public-url=ftp://x"],
            "--public-url must be a URL such as https://deploy.example.org, not 'ftp://x'",
        ),
        (
            ["serve", "--max-connections=none"],
            "--max-connections must be a number from 4 to 100000, not 'none'",
        ),
        (["token", "revoke", "x"], "ID is a number of `cachix-workspace token list`, not 'x'"),
        ([], f"missing command: {GROUPS}: see --help"),
        (["push"], f"unknown command `push`; {THERE_ARE}"),
        ([SECRET], f"unknown command; {THERE_ARE}"),
    ],
)
def test_one_sentence_for_wrong_usage(
    argv: list[str], sentence: str, capsys: Captured, data: str
) -> None:
    assert main([*([data] if argv else []), *argv]) == 64
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


WHERE = "[--data=DIR | --url=URL [--token-file=FILE]]"
CACHE_FORMS = f"""\
  cachix-workspace cache list [--json] {WHERE}
  cachix-workspace cache create NAME [--private] [--out=FILE]
                         [[--public-url=URL] [--data=DIR] | --url=URL [--token-file=FILE]]
  cachix-workspace cache show NAME [--json] {WHERE}
  cachix-workspace cache key (rotate | retire) NAME [--out=FILE]
                         {WHERE}
  cachix-workspace cache gc NAME [--keep-deployments=N] [--keep-days=DAYS] [--dry-run] [--json]
                         {WHERE}
  cachix-workspace cache (pin | unpin) NAME PATH {WHERE}
"""
CREATE_FORM = f"""\
  cachix-workspace token create (agent | activate | admin | metrics)
                                [--description=TEXT] [--expires=DAYS] [--cache=NAME]
                                [--name=NAME | --names=PATTERNS | --agents=PATTERNS | --shared]
                                [--out=FILE | --names-from=FILE --out-dir=DIR] [--count=N]
                                {WHERE}
"""


@pytest.mark.parametrize(
    ("argv", "sentence", "forms"),
    [
        (
            ["cache", "push"],
            "unknown command `cache push`; cache has: list, create, show, key, gc, pin, unpin",
            CACHE_FORMS,
        ),
        (
            ["cache", SECRET],
            "unknown command; cache has: list, create, show, key, gc, pin, unpin",
            CACHE_FORMS,
        ),
        (
            ["cache"],
            "missing command after `cache`; cache has: list, create, show, key, gc, pin, unpin",
            CACHE_FORMS,
        ),
        (["token", "create"], "missing or unexpected arguments for `token create`", CREATE_FORM),
        (
            ["token", "create", "root", "--expires", "3"],
            "missing or unexpected arguments for `token create`",
            CREATE_FORM,
        ),
        (
            ["agent", "list", "web"],
            "missing or unexpected arguments for `agent list`",
            (
                "  cachix-workspace agent list [--label=LABEL] [--state=STATE] [--json]\n"
                "                         [--data=DIR | --url=URL [--token-file=FILE]]\n"
            ),
        ),
    ],
)
def test_an_unknown_form_shows_the_forms_that_there_are(
    argv: list[str], sentence: str, forms: str, capsys: Captured, data: str
) -> None:
    for words in ([*argv, data], [data, *argv]):
        assert main(words) == 64
        assert capsys.readouterr() == ("", f"error: {sentence}\n{forms}")


def test_serve_with_an_argument_shows_its_form(capsys: Captured) -> None:
    assert main(["serve", SECRET]) == 64
    out, err = capsys.readouterr()
    assert not out and SECRET not in err
    first, second, *_ = err.splitlines()
    assert first == "error: missing or unexpected arguments for `serve`"
    assert second.startswith("  cachix-workspace serve [--listen=ADDRESS]")


WORDS = ["serve", "token", "create", "agent", "--data", "--json", "-h", "--", "x", "--x=y", "-x"]


@given(st.lists(st.sampled_from([*WORDS, "", "--data=", "--data x"])))
@settings(deadline=None)
def test_any_words_are_parsed_or_refused(argv: list[str]) -> None:
    with contextlib.suppress(UsageError, SystemExit):
        parse(argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "", "token", "list"], ["--data=", "token", "list"]),
        (["--data ", "token", "list"], ["--data=", "token", "list"]),
        (["", "token", "list", ""], ["token", "list"]),
        (["token", "--description", "--weird"], ["token", "--description=--weird"]),
        (["token", "--description", "--"], ["token", "--description", "--"]),
    ],
)
def test_values_of_options_are_kept(argv: list[str], words: list[str]) -> None:
    assert normalize(argv, USAGE) == words


def test_public_urls() -> None:
    def check(text: str) -> str:
        return checked_url(text, "--public-url", "https://deploy.example.org", bare=True)

    assert check("https://x.org/sub/") == "https://x.org/sub"
    wrong = ("x.org", "https://", "https://u@x.org", "https://x.org?a", "http://x:99999")
    for text in (*wrong, "https://x.org#a", "http://["):
        with pytest.raises(UsageError, match="--public-url must be a URL such as"):
            check(text)


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_tokens_and_a_cache(tmp_path: Path, capsys: Captured, data: str) -> None:
    assert main(["token", "list", data]) == 1
    assert "no workspace at" in capsys.readouterr().err
    assert main(["init", data]) == 0
    assert main(["cache", "create", "mine", "--public-url=https://x.org", data]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("mine.x.org-1:") and out.count("\n") == 1
    assert main(["cache", "create", "mine", data]) == 1
    assert main(["cache", "create", "Not/good", data]) == 1
    assert main(["cache", "show", "other", data]) == 1
    assert main(["token", "create", "agent", "--cache=other", data]) == 1
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
    create = ["token", "create", "agent", "--cache=mine", "--expires=30", "--description=web"]
    assert main([*create, data]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("agent-") and out.count("\n") == 1
    assert err == "agent token 1, which is not shown again:\n"
    assert main(["token", "list", "--json", data]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(token["id"], token["kind"], token["state"]) for token in listed] == [
        (1, "agent", "valid")
    ]
    assert "hash" not in listed[0]
    assert main(["token", "revoke", "1", data]) == 0
    assert main(["token", "revoke", "7", data]) == 1
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_tables(capsys: Captured, data: str) -> None:
    assert main(["init", data]) == 0
    assert main(["token", "create", "admin", "--description=for me", data]) == 0
    capsys.readouterr()
    assert main(["token", "list", data]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head == "ID  KIND   STATE  CREATED     EXPIRES  DESCRIPTION"
    assert re.fullmatch(r"1   admin  valid  \d{4}-\d\d-\d\d  -        for me", row)
    assert main(["agent", "list", data]) == 0
    assert capsys.readouterr().out == "NAME  STATE  SYSTEM  VERSION  SINCE\n"
    assert main(["cache", "create", "mine", data]) == 0
    capsys.readouterr()
    assert main(["cache", "show", "mine", data]) == 0
    facts = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert facts["url"] == "http://127.0.0.1:8080/cache/mine" and facts["public"] == "True"
    assert facts["public key"].startswith("mine.127.0.0.1-1:")


@pytest.mark.parametrize("description", ["--weird", "--expires=0", "-x", "two words", ""])
def test_a_description_may_be_anything(description: str, capsys: Captured, data: str) -> None:
    assert main(["init", data]) == 0
    assert main(["token", "create", "agent", "--description", description, data]) == 0
    capsys.readouterr()
    assert main(["token", "list", "--json", data]) == 0
    (token,) = json.loads(capsys.readouterr().out)
    assert (token["description"], token["expires_on"]) == (description, None)


@pytest.mark.parametrize("days", ["0", "-1", "never", "nan", "inf", "36501"])
def test_a_token_expires_in_the_future(days: str, capsys: Captured, data: str) -> None:
    assert main(["token", "create", "agent", f"--expires={days}", data]) == 64
    sentence = "--expires must be a number of days above 0 and at most 36,500"
    assert capsys.readouterr() == ("", f"error: {sentence}, not '{days}'\n")


def test_a_reader_that_leaves(data: str) -> None:
    assert main(["init", data]) == 0
    argv = [sys.executable, "-m", "cachix_workspace", "token", "create", "agent", data]
    with subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "agent token 1, which is not shown again:\n")


def test_a_full_disk_below_stdout(data: str) -> None:
    assert main(["init", data]) == 0
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = subprocess.run(
            [sys.executable, "-m", "cachix_workspace", "token", "create", "agent", data],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert process.returncode == 1
    assert "warning: stdout can't be written: " in process.stderr

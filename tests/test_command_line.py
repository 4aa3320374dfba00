"""The command line of the agent: what docopt is given, what is refused with which sentence, where the token is from."""

import os
import re
import string

import pytest
from hosts import PROJECT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cachix_connection
import cachix_console
import cachix_deploy
import cachix_options
import cachix_options
import cachix_protocol
from cachix_console import normalized, read_token
from cachix_deploy import main
from cachix_options import parse
from cachix_protocol import UsageError

SECRET = "s3cr3t-t0ken"
WORDS = st.one_of(
    st.sampled_from(["deploy", "agent", "activate", "web", "system", "spec.json", "--", "-", "", "-v", "--agent"]),
    st.sampled_from(cachix_console.LONG_OPTIONS).filter(lambda option: option not in ("--help", "--version")),
    st.sampled_from(["--host http://a", "--host=http://a", "--host=", "--verb", "--tok", "--token=x", "--host  x"]),
    st.text(string.printable + "ä\ud800\0", max_size=8),
)  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing of the developer's: a token is there, a home too, and no agent can start by mistake."""
    for name in ("CREDENTIALS_DIRECTORY", "CACHIX_ACTIVATE_TOKEN", "CACHIX_DEPLOY_WAITS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", SECRET)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(cachix_deploy, "agent_command", lambda options: 0)
    monkeypatch.setattr(cachix_deploy, "verbose", False)


def refused(capsys, *argv, status=64):
    """The one sentence with which a command line is refused."""
    assert main(list(argv)) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err[7:].rstrip("\n")


# --- the docopt front ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host http://a", "agent", "web"], ["--host", "http://a", "agent", "web"]),
        (["--host=http://a b", "agent"], ["--host=http://a b", "agent"]),
        (["deploy", "", "agent", "web", ""], ["deploy", "agent", "web"]),
        (["--token-file", "--odd-name", "agent"], ["--token-file", "--odd-name", "agent"]),
        (["agent", "two words"], ["agent", "two words"]),
        (["activate", "--agent", "--any", "--", "--any"], ["activate", "--agent", "--any", "--", "--any"]),
    ],
)  # fmt: skip
def test_what_docopt_is_given(argv, words):
    assert normalized(argv) == words


@pytest.mark.parametrize(
    "argv",
    [
        ["--host", "http://a/", "deploy", "agent", "web", "system"],
        ["--host http://a/", "deploy", "agent", "web", "system"],
        ["deploy", "--host=http://a/", "agent", "web", "system"],
        ["agent", "web", "system", "--host", "http://a/"],
        ["agent", "--host=http://a/", "web", "", "system"],
    ],
)
def test_options_stand_anywhere(argv):
    options = parse(argv)
    assert (options["agent"], options["NAME"], options["PROFILE"]) == (True, "web", "system")
    assert options["--host"] == "http://a/" and not options["activate"]
    parsed = cachix_options.agent_options(options)
    assert (parsed.name, parsed.profile, parsed.peer.host) == ("web", "system", "http://a")


def test_defaults():
    options = cachix_options.agent_options(parse(["agent"]))
    assert options.peer.host == "https://cachix.org" and options.name and options.profile is None
    assert (options.settings.confirm_timeout, options.settings.activation_timeout) == (120, 3600)
    assert (options.settings.on_unit_failure, options.settings.on_reboot_needed) == (
        "rollback",
        "fail",
    )


def test_several_agents_of_a_spec():
    options = parse(["activate", "s.json", "--agent=a", "--async", "--agent", "b", "--timeout=5"])
    assert (options["SPEC"], options["--agent"], options["--async"]) == ("s.json", ["a", "b"], True)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=7))
@example(["--host", ""])
@example(["agent", "-x" + SECRET])
def test_any_words_are_parsed_or_refused_by_a_sentence(words):
    try:
        options = parse(words)
    except UsageError as error:
        assert (
            re.fullmatch(r".+: see --help", str(error))
            and "\n" not in str(error)
            and error.status == 64
        )
    else:
        assert options["agent"] != options["activate"]


@settings(deadline=None)
@given(st.lists(WORDS, max_size=5))
def test_a_second_look_changes_nothing(words):
    try:
        once = normalized(words)
    except UsageError:
        return
    assert "" not in once
    if not any(" " in word for word in once):
        assert normalized(once) == once


# --- refusals: one sentence, status 64, no value shown -------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["--token", "--tok", "--token-fil", "--tokens", "--hos", "--verb", "--nothing"]
)
@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_abbreviations_are_refused_without_their_value(capsys, word, form):
    said = refused(capsys, *form.format(word, SECRET).split(" "), "agent", "web")
    assert said.startswith(f"there is no option {word}") and SECRET not in said
    assert ("--token-file" in said) == word.startswith("--tok")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "there must be a command, agent or activate: see --help"),
        (["deploy"], "there must be a command, agent or activate: see --help"),
        (["agnet", "web"], "there must be a command, agent or activate: see --help"),
        (["agent", "web", "system", "more"], "agent takes no such arguments: see --help"),
        (["activate"], "activate needs a deploy.json: see --help"),
        (["agent", "activate", "x", "y"], "agent takes no such arguments: see --help"),
        (["agent", "-q"], "agent takes no such arguments: see --help"),
        (["agent", "--host"], "--host requires argument: see --help"),
        (["agent", "--verbose=yes"], "--verbose must not have an argument: see --help"),
        (["switch"], "there must be a command, agent or activate: see --help"),
        (["switch", "a", "b"], "there must be a command, agent or activate: see --help"),
    ],
)
def test_wrong_usage(capsys, argv, said):
    assert refused(capsys, *argv) == said


@pytest.mark.parametrize(
    "name",
    ["a b", "../x", ".hidden", "-", "a/b", "ä", "x" * 129, "a\nb", "a:b", "\ud800", "NAME=1"],
)
@pytest.mark.parametrize("what", ["NAME", "PROFILE"])
def test_names_are_checked(capsys, name, what):
    said = refused(capsys, "agent", *([name] if what == "NAME" else ["web", name]))
    assert said.startswith(f"{what} ") and "letters, digits" in said


@pytest.mark.parametrize("name", ["a", "web-1.example_com", "0", "x" * 128, "A.B"])
def test_names_that_are_fine(name):
    assert main(["agent", name, name]) == 0


@pytest.mark.parametrize(
    "host",
    ["ftp://a", "http://", "https://", "http://[", "http://[::1", "http://a:b", "http://a:99999", "http://a?x=1", "://",
     "http://\u2100", "http://a]b", "file:///etc/passwd", "https:///path"],
)  # fmt: skip
def test_hosts_are_checked(capsys, host):
    said = refused(capsys, "--host", host, "agent", "web")
    assert said.startswith("--host must be a URL such as https://cachix.org, not ")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("cachix.org", "https://cachix.org"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("https://example.org/deploy/", "https://example.org/deploy"),
        ("HTTPS://Example.org", "https://Example.org"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("localhost:8080", "https://localhost:8080"),
    ],
)
def test_hosts_that_are_fine(host, url):
    assert cachix_connection.Peer.create(host, "t").host == url


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_host_is_taken_or_refused(host):
    try:
        assert cachix_connection.Peer.create(host, "t").host.startswith("http")
    except UsageError as error:
        assert "--host must be" in str(error)


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option in ("--confirm-timeout", "--activation-timeout")
     for value in ("0", "-1", "x", "nan", "inf", "1e9", "1,5", "5s")]
    + [("--on-unit-failure", "ignore"), ("--on-unit-failure", "Rollback"), ("--on-reboot-needed", "now")],
)  # fmt: skip
def test_values_are_checked(capsys, option, value):
    said = refused(capsys, "agent", "web", f"{option}={value}")
    assert said.startswith(f"{option} must be ") and repr(value) in said


# --- the token -------------------------------------------------------------------------------------------------------


def test_no_token(capsys, monkeypatch):
    for value in (None, "", " ", '""'):
        monkeypatch.delenv("CACHIX_AGENT_TOKEN")
        if value is not None:
            monkeypatch.setenv("CACHIX_AGENT_TOKEN", value)
        said = refused(capsys, "agent", "web")
        assert said == "there is no token: set CACHIX_AGENT_TOKEN, or give --token-file=FILE"
        monkeypatch.setenv("CACHIX_AGENT_TOKEN", "")


@pytest.mark.parametrize("text", ["a b", "two\nlines", "ä", "x\x00y", "bell\a"])
def test_a_token_that_can_be_none_is_not_shown(capsys, tmp_path, text):
    (tmp_path / "token").write_text(text)
    said = refused(capsys, "agent", "web", f"--token-file={tmp_path}/token")
    assert said == "the token has blanks or characters that no token has"


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"{SECRET}\n",
        f"CACHIX_AGENT_TOKEN={SECRET}\n",
        f"CACHIX_AGENT_TOKEN='{SECRET}'\n",
        f' "{SECRET}" \r\n',
    ],
)
def test_the_forms_of_a_token_file(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "another")
    (tmp_path / "token").write_text(text)
    assert read_token("CACHIX_AGENT_TOKEN", str(tmp_path / "token")) == SECRET


@pytest.mark.parametrize("kind", ["missing", "directory", "unreadable", "binary", "empty"])
def test_token_files_that_can_not_be_used(capsys, tmp_path, monkeypatch, kind):
    path = tmp_path / "token"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(
            b"\xff\xfe\x80" if kind == "binary" else b"\n" if kind == "empty" else SECRET.encode()
        )
    if kind == "unreadable":  # root may read everything
        real = open

        def denied(name, *args, **kw):
            if name == str(path):
                raise PermissionError(13, "Permission denied", name)
            return real(name, *args, **kw)

        monkeypatch.setattr("builtins.open", denied)
    said = refused(capsys, "agent", "web", "--token-file", str(path))
    assert said.startswith(
        "there is no token" if kind == "empty" else f"the token file {path} can't be read: "
    )
    assert SECRET not in said


def test_credentials_of_systemd(tmp_path, monkeypatch):
    monkeypatch.delenv("CACHIX_AGENT_TOKEN")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "CACHIX_AGENT_TOKEN").write_text(f"{SECRET}\n")
    assert read_token("CACHIX_AGENT_TOKEN", None) == SECRET
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "of-the-environment")
    assert read_token("CACHIX_AGENT_TOKEN", None) == "of-the-environment"


@pytest.mark.parametrize("variable", ["CACHIX_AGENT_TOKEN", "CACHIX_ACTIVATE_TOKEN"])
def test_each_command_has_its_own_token(capsys, monkeypatch, variable):
    monkeypatch.delenv("CACHIX_AGENT_TOKEN")
    argv = ["agent", "web"] if "AGENT" in variable else ["activate", "s.json"]
    assert variable in refused(capsys, *argv)


# --- the program -----------------------------------------------------------------------------------------------------


def test_without_home_the_passwd_entry_counts(host, peer):
    argv = [
        "env",
        "-u",
        "HOME",
        "-u",
        "XDG_CACHE_HOME",
        "-u",
        "XDG_STATE_HOME",
        *command("cachix-deploy"),
    ]
    code = "import activate.lock as l, activate.journal as j; print(l.shared_path('agent', 'x'), j.state_directory())"
    done = host.run(
        [*argv[:7], "-u", "STATE_DIRECTORY", str(PROJECT / ".venv/bin/python"), "-c", code]
    )
    assert done.returncode == 0, done.stderr
    home = os.path.expanduser("~root")
    assert done.stdout.split()[0] == f"{home}/.cache/cachix/deploy/locks/agent-x.lock"
    peer.misbehave("/ws", "401")
    env = {"CACHIX_AGENT_TOKEN": SECRET, "XDG_CACHE_HOME": str(host.directory / "home/cache")}
    done = host.run(["env", "-u", "HOME", *argv[7:], "--host", peer.url, "agent", "web"], 20, env)
    assert done.returncode == 77 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("program", ["cachix-deploy", "cachix"])
def test_help_and_version_of_the_installed_programs(host, program):
    for words in (["--help"], ["-h"], ["deploy", "agent", "--help"]):
        done = host.run([*command(program), *words])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == cachix_options.USAGE.strip("\n") + "\n"
    done = host.run([*command(program), "--version"])
    assert (done.returncode, done.stdout) == (0, f"cachix-deploy {cachix_protocol.__version__}\n")
    done = host.run([*command(program), "agent", "a b"], env={"CACHIX_AGENT_TOKEN": SECRET})
    assert (done.returncode, done.stdout) == (64, "") and done.stderr.startswith(
        "error: NAME 'a b' is not usable"
    )
    done = host.run([*command(program), "--token", SECRET, "agent"])
    assert done.returncode == 64 and SECRET not in done.stderr


def test_the_usage_names_each_option_once():
    text = cachix_options.USAGE
    listed = re.findall(r"^  (?:-\w )?(--[a-z-]+)", text, re.MULTILINE)
    assert len(listed) == len(set(listed)) and set(listed) == set(cachix_console.LONG_OPTIONS)
    assert set(re.findall(r"--[a-z-]+", text)) == set(listed)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_readme_names_no_other_options_than_the_usage():
    readme = (PROJECT / "README.rst").read_text()
    lines = [
        line
        for line in readme.splitlines()
        if not re.search(r"cachix-workspace|nix |nix-|--to |pip ", line)
    ]
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    workspace = {"--public-url", "--listen", "--data"}
    assert told - workspace <= set(cachix_console.LONG_OPTIONS)
    described = set(re.findall(r"^``(--[a-z-]+)", readme, re.MULTILINE))
    agents = {
        o
        for o in cachix_console.LONG_OPTIONS
        if o not in ("--help", "--version", "--verbose", "--host")
    }
    assert agents <= told and described <= agents
    for status in re.findall(r"(\d+) ([a-z ]+)", cachix_options.USAGE.split("Exit status: ")[1]):
        assert status[0] in readme

"""The command line of the program: its options and arguments, every refusal, and the token."""

import os
import re
import signal
import string
import subprocess
import sys

import pytest
from hosts import PROJECT, command
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cachix_connection
import cachix_console
import cachix_deploy
import cachix_options
import cachix_protocol
from cachix_console import read_token
from cachix_deploy import main
from cachix_options import USAGE, parse
from cachix_protocol import UsageError

SECRET = "s3cr3t-t0ken"
LONG_OPTIONS = cachix_console.long_options(USAGE)
PLAIN_WORDS = ["deploy", "agent", "activate", "web", "system", "spec.json", "--", "-", "", "-v"]
ODD_WORDS = ["--host http://a", "--host=http://a", "--host=", "--host  x"]
BAD_WORDS = ["--verb", "--tok", "--token=x"]
WORDS = st.one_of(
    st.sampled_from(PLAIN_WORDS),
    st.sampled_from([name for name in LONG_OPTIONS if name not in ("--help", "--version")]),
    st.sampled_from(ODD_WORDS + BAD_WORDS),
    st.text(string.printable + "ä\ud800\0", max_size=8),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Set a token and a state directory, and let no agent start by mistake."""
    for name in ("CREDENTIALS_DIRECTORY", "CACHIX_ACTIVATE_TOKEN", "CACHIX_DEPLOY_WAITS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", SECRET)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(cachix_deploy, "agent_command", lambda options: 0)
    monkeypatch.setattr(cachix_console, "verbose", False)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def refusal(capsys, *argv, status=64):
    """Run a command line that is refused; the sentence of its error."""
    assert main(list(argv)) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err[7:].rstrip("\n")


# --- the docopt front -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host http://a", "agent", "web"], ["--host=http://a", "agent", "web"]),
        (["--host=http://a b", "agent"], ["--host=http://a b", "agent"]),
        (["deploy", "", "agent", "web", ""], ["deploy", "agent", "web"]),
        (["--token-file", "--odd-name", "agent"], ["--token-file=--odd-name", "agent"]),
        (["--token-file=--odd-name", "agent"], ["--token-file=--odd-name", "agent"]),
        (["agent", "two words"], ["agent", "two words"]),
        (["agent", "--host"], ["agent", "--host"]),
        (["activate", "--agent", "--any", "--", "-x"], ["activate", "--agent=--any", "--", "-x"]),
    ],
)
def test_command_lines_as_docopt_gets_them(argv, words):
    assert cachix_console.normalize(argv, USAGE) == words


@pytest.mark.parametrize("value", ["--odd-name", "--host", "--token", "-x", "--verbose", "x=y"])
def test_a_value_may_look_like_an_option(value):
    for argv in (["--token-file", value], [f"--token-file={value}"], [f"--token-file {value}"]):
        assert parse([*argv, "agent", "web"])["--token-file"] == value
        assert parse(["agent", "web", *argv])["NAME"] == "web"
    assert parse(["activate", "s.json", "--agent", value])["--agent"] == [value]


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


@pytest.mark.parametrize(
    ("argv", "host"),
    [
        # NixOS: a line of a unit, split by systemd
        (["deploy", "agent", "web"], "https://cachix.org"),
        (["--verbose", "--host", "http://a", "deploy", "agent", "web", "system"], "http://a"),
        # home-manager: each word quoted, so that the host is one with its option
        (["--verbose", "--host http://a", "deploy", "agent", "web", "home-manager"], "http://a"),
        (["deploy", "agent", "web", "home-manager"], "https://cachix.org"),
        # nix-darwin: a script without options
        (["deploy", "agent", "web"], "https://cachix.org"),
        # Cachix's client before 1.4, and with its configuration
        (["--hostname", "http://a", "-c", "/dev/null", "deploy", "agent", "web"], "http://a"),
    ],
)
def test_the_command_lines_of_other_modules(argv, host):
    options = cachix_options.agent_options(parse(argv))
    assert (options.name, options.peer.host) == ("web", host)
    assert options.profile == (argv[-1] if argv[-1] != "web" else None)


def test_defaults():
    options = cachix_options.agent_options(parse(["agent"]))
    assert options.peer.host == "https://cachix.org" and options.name and options.profile is None
    policy = options.policy
    assert (policy.confirm_timeout, policy.activation_timeout) == (120, 3600)
    assert (policy.on_unit_failure, policy.on_reboot_needed) == ("rollback", "fail")


def test_the_workspace_of_the_environment(monkeypatch):
    monkeypatch.setenv("CACHIX_HOST", "https://deploy.test/")
    assert cachix_options.host_of(parse(["agent"])) == "https://deploy.test"
    options = parse(["agent", "--host=https://other.test"])
    assert cachix_options.host_of(options) == "https://other.test"
    monkeypatch.setenv("CACHIX_HOST", "")
    assert cachix_options.host_of(parse(["agent"])) == "https://cachix.org"


def test_upstreams():
    options = cachix_options.push_options(parse(["push", "result"]))
    assert options.upstreams == ("https://cache.nixos.org",)
    words = ["push", "a", "b", "--upstream=https://a.test/x/", "--upstream", "http://b.test"]
    options = cachix_options.push_options(parse([*words, "--cache=main"]))
    assert options.upstreams == ("https://a.test/x", "http://b.test") and options.cache == "main"
    assert cachix_options.push_options(parse(["push", "a", "--upstream=none"])).upstreams == ()
    with pytest.raises(UsageError, match="--upstream must be a URL such as"):
        cachix_options.push_options(parse(["push", "a", "--upstream=cache.nixos.org"]))


def test_several_agents_of_a_spec():
    options = parse(["activate", "s.json", "--agent=a", "--async", "--agent", "b", "--timeout=5"])
    assert (options["SPEC"], options["--agent"]) == (["s.json"], ["a", "b"])
    assert options["--async"]


@settings(deadline=None)
@given(st.lists(WORDS, max_size=7))
@example(["--host", ""])
@example(["agent", "-x" + SECRET])
def test_any_words_are_parsed_or_refused_by_a_sentence(words):
    try:
        options = parse(words)
    except UsageError as error:
        assert re.fullmatch(r".+: see --help", str(error)) and error.status == 64
    except SystemExit as end:  # one of the words asks for help
        assert end.code in (None, 0)
    else:
        assert options["agent"] != options["activate"]


@settings(deadline=None)
@given(st.lists(WORDS, max_size=5))
def test_a_normal_command_line_stays_as_it_is(words):
    try:
        once = cachix_console.normalize(words, USAGE)
    except UsageError:
        return
    assert "" not in once
    if not any(" " in word for word in once):
        assert cachix_console.normalize(once, USAGE) == once


# --- refusals: one sentence, status 64, no value in it --------------------------------------------


@pytest.mark.parametrize(
    "word", ["--token", "--tok", "--token-fil", "--tokens", "--hos", "--verb", "--nothing"]
)
@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_abbreviations_are_refused_without_their_value(capsys, word, form):
    sentence = refusal(capsys, *form.format(word, SECRET).split(" "), "agent", "web")
    assert sentence.startswith(f"there is no option {word}") and SECRET not in sentence
    assert ("--token-file" in sentence) == word.startswith("--tok")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "missing command: agent or activate"),
        (["deploy"], "missing command: agent or activate"),
        (["agnet", "web"], "missing command: agent or activate"),
        (["--host", "agent"], "missing command: agent or activate"),
        (["agent", "web", "system", "more"], "unexpected arguments for agent"),
        (["activate"], "activate needs a deploy.json"),
        (["activate", "s.json", "--bootstrap"], "unexpected arguments for activate"),
        (["agent", "activate", "x", "y"], "unexpected arguments for agent"),
        (["agent", "-q"], "unexpected arguments for agent"),
        (["agent", "--host"], "--host requires argument"),
        (["agent", "--verbose=yes"], "--verbose must not have an argument"),
        (["switch"], "missing command: agent or activate"),
        (["switch", "a", "b"], "missing command: agent or activate"),
    ],
)
def test_wrong_usage(capsys, argv, sentence):
    assert refusal(capsys, *argv) == f"{sentence}: see --help"


def test_a_switch_process_is_no_command_of_the_program(capsys, host):
    """Agents start it by themselves. Typed by hand, it would wait for its agent for hours."""
    sentence = "missing command: agent or activate: see --help"
    assert refusal(capsys, "switch", "x") == sentence
    argv = [*command("cachix-deploy"), "switch", "00000000-0000-4000-8000-000000000001"]
    process = host.popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE)  # stdin stays open
    assert process.stdin is not None and process.stderr is not None
    assert process.wait(10) == 64
    assert process.stderr.read().decode() == f"error: {sentence}\n"
    process.stdin.close()
    process.stderr.close()


@pytest.mark.parametrize(
    "name",
    ["a b", "../x", ".hidden", "-", "a/b", "ä", "x" * 129, "a\nb", "a:b", "\ud800", "NAME=1"],
)
@pytest.mark.parametrize("what", ["NAME", "PROFILE"])
def test_names_are_checked(capsys, name, what):
    sentence = refusal(capsys, "agent", *([name] if what == "NAME" else ["web", name]))
    assert sentence.startswith(f"{what} ") and "letters, digits" in sentence


@pytest.mark.parametrize("name", ["a", "web-1.example_com", "0", "x" * 128, "A.B"])
def test_names_that_are_fine(name):
    assert main(["agent", name, name]) == 0


@pytest.mark.parametrize(
    "host",
    ["ftp://a", "http://", "https://", "http://[", "http://[::1", "http://a:b", "http://a:99999"]
    + ["http://a?x=1", "://", "http://\u2100", "http://a]b", "file:///etc/passwd", "https:///path"],
)
def test_hosts_are_checked(capsys, host):
    sentence = refusal(capsys, "--host", host, "agent", "web")
    assert sentence.startswith("--host must be a URL such as https://cachix.org, not ")


@pytest.mark.parametrize("form", ["http://joe:{}@a", "joe:{}@a", "http://{}@[", "http://x:{}/y@a"])
def test_a_password_in_the_host_is_refused_and_not_repeated(capsys, form):
    sentence = refusal(capsys, "--host", form.format(SECRET), "agent", "web")
    assert "without user and password" in sentence and SECRET not in sentence


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
    ("option", "values"),
    [
        ("--confirm-timeout", ["0", "-1", "x", "nan", "inf", "1e9", "1,5", "5s", "--verbose"]),
        ("--activation-timeout", ["0", "-1", "x", "nan", "inf", "1e9", "1,5", "5s", "--verbose"]),
        ("--on-unit-failure", ["ignore", "Rollback"]),
        ("--on-reboot-needed", ["now"]),
    ],
)
def test_values_are_checked(capsys, option, values):
    for value in values:
        for argv in ([f"{option}={value}"], [option, value]):
            sentence = refusal(capsys, "agent", "web", *argv)
            assert sentence.startswith(f"{option} must be ") and repr(value) in sentence


# --- the token ------------------------------------------------------------------------------------


def test_no_token(capsys, monkeypatch):
    for value in (None, "", " ", '""'):
        monkeypatch.delenv("CACHIX_AGENT_TOKEN")
        if value is not None:
            monkeypatch.setenv("CACHIX_AGENT_TOKEN", value)
        sentence = refusal(capsys, "agent", "web")
        assert sentence == "there is no token: set CACHIX_AGENT_TOKEN, or give --token-file=FILE"
        monkeypatch.setenv("CACHIX_AGENT_TOKEN", "")


@pytest.mark.parametrize("text", ["a b", "two\nlines", "ä", "x\x00y", "bell\a"])
def test_an_impossible_token_is_not_shown(capsys, tmp_path, text):
    (tmp_path / "token").write_text(text)
    sentence = refusal(capsys, "agent", "web", f"--token-file={tmp_path}/token")
    assert sentence == "the token contains whitespace or non-ASCII characters"


@pytest.mark.parametrize(
    "form",
    [
        *("{}", "{}\n", "CACHIX_AGENT_TOKEN={}\n", "CACHIX_AGENT_TOKEN='{}'\n", ' "{}" \r\n'),
        *("export CACHIX_AGENT_TOKEN={}\n", 'export CACHIX_AGENT_TOKEN="{}"', "\ufeff{}\n"),
        "# of the workspace\n\nCACHIX_AGENT_TOKEN={} # since May\nOTHER=1\n",
        "CACHIX_SIGNING_KEY=x\r\n  export  CACHIX_AGENT_TOKEN='{}'  ; a comment\r\n",
        "CACHIX_AGENT_TOKEN=old\nCACHIX_AGENT_TOKEN={}\n",
        "; a comment of systemd\n{}\n# another\n",
    ],
)
def test_the_forms_of_a_token_file(tmp_path, monkeypatch, form):
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "another")
    (tmp_path / "token").write_text(form.format(SECRET))
    assert read_token("CACHIX_AGENT_TOKEN", str(tmp_path / "token")) == SECRET


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"CACHIX_ACTIVATE_TOKEN={SECRET}\n", "CACHIX_ACTIVATE_TOKEN"),
        (f"export A={SECRET}\nB='{SECRET}'\n", "A, B"),
    ],
)
def test_a_file_with_other_variables_alone(capsys, tmp_path, text, names):
    (tmp_path / "token").write_text(text)
    sentence = refusal(capsys, "agent", "web", f"--token-file={tmp_path}/token")
    assert sentence == f"the token file sets {names}, but not CACHIX_AGENT_TOKEN"


@pytest.mark.parametrize("token", ["YWJjZA==", "abc=", "a.b-c_d", "eyJhbGciOiJIUzI1NiJ9.e30.x-_y="])
def test_a_token_may_look_like_a_variable(tmp_path, token):
    (tmp_path / "token").write_text(f"{token}\n")
    assert read_token("CACHIX_AGENT_TOKEN", str(tmp_path / "token")) == token


@pytest.mark.parametrize("kind", ["missing", "directory", "unreadable", "binary", "empty"])
def test_token_files_that_can_not_be_used(capsys, tmp_path, monkeypatch, kind):
    path = tmp_path / "token"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        contents = {"binary": b"\xff\xfe\x80", "empty": b"\n"}
        path.write_bytes(contents.get(kind, SECRET.encode()))
    if kind == "unreadable":  # root may read everything
        real = open

        def denied(name, *args, **kw):
            if name == str(path):
                raise PermissionError(13, "Permission denied", name)
            return real(name, *args, **kw)

        monkeypatch.setattr("builtins.open", denied)
    sentence = refusal(capsys, "agent", "web", "--token-file", str(path))
    reason = "there is no token" if kind == "empty" else f"the token file {path} can't be read: "
    assert sentence.startswith(reason) and SECRET not in sentence


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
    assert variable in refusal(capsys, *argv)


# --- the program ----------------------------------------------------------------------------------


def test_without_home_the_passwd_entry_counts(host, peer):
    names = ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "STATE_DIRECTORY")
    env = ["env", *(f"--unset={name}" for name in names)]
    code = "from activate import lock; print(lock.shared_path('agent', 'x'))"
    done = host.run([*env, sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    home = os.path.expanduser("~root")
    assert done.stdout.strip() == f"{home}/.cache/cachix/deploy/locks/agent-x.lock"
    peer.misbehave("/ws", "401")
    variables = {"CACHIX_AGENT_TOKEN": SECRET, "XDG_CACHE_HOME": str(host.directory / "home/cache")}
    argv = ["env", "--unset=HOME", *command("cachix-deploy"), "--host", peer.url, "agent", "web"]
    done = host.run(argv, 20, variables)
    assert done.returncode == 77 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("program", ["cachix-deploy", "cachix"])
def test_help_and_version_of_the_installed_programs(host, program):
    for words in (["--help"], ["-h"], ["deploy", "agent", "--help"]):
        done = host.run([*command(program), *words])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == USAGE.strip("\n") + "\n"
    done = host.run([*command(program), "--version"])
    assert (done.returncode, done.stdout) == (0, f"cachix-deploy {cachix_protocol.__version__}\n")
    done = host.run([*command(program), "agent", "a b"], env={"CACHIX_AGENT_TOKEN": SECRET})
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("error: NAME 'a b' is not usable")
    done = host.run([*command(program), "--token", SECRET, "agent"])
    assert done.returncode == 64 and SECRET not in done.stderr


@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_python_without_docstrings(host, option):
    program = [sys.executable, option, str(PROJECT / "cachix_deploy.py")]
    done = host.run([*program, "--help"])
    assert (done.returncode, done.stdout, done.stderr) == (0, USAGE.strip("\n") + "\n", "")
    done = host.run([*program, "agent", "--tok", "x"])
    assert done.returncode == 64 and done.stderr.startswith("error: there is no option --tok;")
    done = host.run([*program, "agnet"])
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "error: missing command: agent or activate: see --help\n"


def test_the_usage_names_each_option_once():
    assert len(LONG_OPTIONS) == len(set(LONG_OPTIONS))
    assert set(re.findall(r"--[a-z-]+", USAGE)) == set(LONG_OPTIONS)
    assert all(len(line) <= 100 for line in USAGE.splitlines())


def test_the_documents_name_the_options_of_the_usage_and_no_others():
    files = [PROJECT / "README.rst", *(PROJECT / "docs" / f"{n}.rst" for n in ("agent", "ci"))]
    readme = "\n".join(file.read_text() for file in files)
    foreign = re.compile(r"cachix-workspace|nix |nix-|--to |pip ")
    lines = [line for line in readme.splitlines() if not foreign.search(line)]
    names = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    assert names - {"--public-url", "--listen", "--data"} <= set(LONG_OPTIONS)
    entries = set(re.findall(r"^``(--[a-z-]+)", readme, re.MULTILINE))
    options = set(LONG_OPTIONS) - {"--help", "--version", "--verbose", "--host"}
    assert options <= names and entries <= options
    for status in re.findall(r"\d+", USAGE.split("Exit status: ")[1]):
        assert status in readme

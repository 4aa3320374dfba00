"""README.rst is true: its commands are run as written, except for `make test`."""

import re
import shutil
import subprocess

import pytest
from hosts import PROJECT, Host, wait_until

TEXT = (PROJECT / "README.rst").read_text()


def blocks(section):
    """Return the blocks of shell commands in a section: (name of the block, script)."""
    body = re.split(rf"^{section}\n-+\n", TEXT, flags=re.M)[1]
    body = re.split(r"^.+\n-{3,}\n", body, flags=re.M)[0]
    pattern = r"^\.\. code-block:: sh\n(?:    :name: (\w+)\n)?\n((?:    .*\n|\n)+)"
    blocks = re.findall(pattern, body, flags=re.M)
    return [(name, re.sub(r"^    ", "", script, flags=re.M).strip()) for name, script in blocks]


@pytest.fixture
def reader(tmp_path):
    """A host for a reader of README.rst, with a checkout and its own /usr/local/bin."""
    checkout = tmp_path / "checkout"
    argv = ["git", "ls-files", "-z"]
    files = subprocess.run(argv, cwd=PROJECT, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, checkout / name)
    for name in (".venv", ".make"):  # `make setup` has run
        (checkout / name).symlink_to(PROJECT / name)
    (tmp_path / "bin").mkdir()
    with Host(tmp_path / "machine") as host:
        host.environment["PATH"] = f"/usr/local/bin:{host.environment['PATH']}"
        host.output("mount", "--bind", str(tmp_path / "bin"), "/usr/local/bin")
        yield host, checkout


def follow(reader, section):
    """Run the commands of a section. A block with a name is a server, which is left running."""
    host, checkout = reader
    for name, script in blocks(section):
        if name:
            program = host.start(name, ["/bin/sh", "-c", f"exec 2>&1; {script}"], cwd=checkout)
            program.wait_for({"serve": "listening on", "agent": "is connected to"}[name])
            continue
        script = re.sub(r"^make test$", "", script, flags=re.M)
        result = host.run(["/bin/sh", "-euc", script], 250, cwd=checkout)
        assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"


@pytest.mark.timeout(600)
def test_the_commands_of_the_readme(reader):
    host, _ = reader
    follow(reader, "Try it")
    follow(reader, "Host a workspace")
    follow(reader, "Run an agent")
    follow(reader, "Deploy from CI")
    path = wait_until(host.profile)
    assert host.path(path).read_text() == "hello\n"
    follow(reader, "At the machine")


def test_every_section_with_commands_is_followed():
    sections = re.findall(r"^(.+)\n-{3,}\n", TEXT, flags=re.M)
    names = [name for name in sections if blocks(re.escape(name))]
    assert names == [
        "Try it",
        "Host a workspace",
        "Run an agent",
        "Deploy from CI",
        "At the machine",
    ]

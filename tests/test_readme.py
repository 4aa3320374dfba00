"""README.rst is true: its commands are run as they stand there (but for `make test`, which this is part of)."""

import re
import shutil
import subprocess

import pytest
from hosts import PROJECT, Host, wait_until

TEXT = (PROJECT / "README.rst").read_text()


def blocks(section):
    """The shell commands of a section: (name of the block, script)."""
    body = re.split(rf"^{section}\n-+\n", TEXT, flags=re.M)[1]
    body = re.split(r"^.+\n-{3,}\n", body, flags=re.M)[0]
    found = re.findall(
        r"^\.\. code-block:: sh\n(?:    :name: (\w+)\n)?\n((?:    .*\n|\n)+)", body, flags=re.M
    )
    return [(name, re.sub(r"^    ", "", script, flags=re.M).strip()) for name, script in found]


@pytest.fixture
def reader(tmp_path):
    """A machine on which somebody follows README.rst in a checkout; /usr/local/bin is the machine's own."""
    checkout = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True
    ).stdout
    for name in filter(None, files.decode().split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, checkout / name)
    for made in (".venv", ".make"):  # what `make` has set up already
        (checkout / made).symlink_to(PROJECT / made)
    (tmp_path / "bin").mkdir()
    with Host(tmp_path / "machine") as host:
        host.environment["PATH"] = f"/usr/local/bin:{host.environment['PATH']}"
        host.output("mount", "--bind", str(tmp_path / "bin"), "/usr/local/bin")
        yield host, checkout


def follow(reader, section):
    """Run the commands of a section; those that go on for ever are left running, by their names."""
    host, checkout = reader
    running = {}
    for name, script in blocks(section):
        if name:
            running[name] = host.start(
                name, ["/bin/sh", "-c", f"exec 2>&1; {script}"], cwd=checkout
            )
            running[name].wait_for({"serve": "listening on", "agent": "is connected to"}[name])
            continue
        for command in [line for line in script.split("\n") if line == "make test"]:
            script = script.replace(command, "")
        done = host.run(["/bin/sh", "-euc", script], 110, cwd=checkout)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return running


@pytest.mark.timeout(300)
def test_the_commands_of_the_readme(reader):
    host, _ = reader
    follow(reader, "Try it")
    follow(reader, "Host a workspace")
    follow(reader, "Run an agent")
    follow(reader, "Deploy from CI")
    path = wait_until(host.profile)
    assert host.path(path).read_text() == "hello\n"


def test_every_section_with_commands_is_followed():
    sections = re.findall(r"^(.+)\n-{3,}\n", TEXT, flags=re.M)
    assert [name for name in sections if blocks(re.escape(name))] == [
        "Try it", "Run an agent", "Host a workspace", "Deploy from CI"
    ]  # fmt: skip

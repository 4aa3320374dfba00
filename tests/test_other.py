"""Our `cachix` before the real one in PATH: subcommands other than `deploy` are passed on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cachix_other

REAL = """#!/bin/sh
printf '%s\\n' "$0" "$@"
[ "$1" != inner ] || exec cachix push again
exit 7
"""


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Our entry point, as pip writes it."""
    return script(tmp_path / "ours")


def script(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "cachix"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom cachix_deploy import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return path


def real(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "cachix"
    path.write_text(REAL)
    path.chmod(0o755)
    return path


def run(path: list[Path], *argv: str) -> tuple[int, list[str], str]:
    """Run `cachix` by PATH; status, lines of stdout, stderr."""
    shell = shutil.which("sh")
    assert shell
    directories = os.pathsep.join([*(str(one.parent) for one in path), "/usr/bin", "/bin"])
    result = subprocess.run(
        [shell, "-c", 'exec cachix "$@"', "sh", *argv],
        env={"PATH": directories, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return result.returncode, result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["push", "mycache", "./result"],
        ["-v", "--hostname", "https://deploy.example.org", "use", "main"],
        ["--config", "deploy", "authtoken", "--stdin"],
        ["-c", "file", "-v", "watch-exec", "main", "--", "nix", "build"],
        ["doctor"],
    ],
)
def test_the_next_program_gets_the_command_line(
    tmp_path: Path, ours: Path, argv: list[str]
) -> None:
    other = real(tmp_path / "real")
    assert run([ours, other], *argv) == (7, [str(other), *argv], "")
    assert run([other, ours], *argv) == (7, [str(other), *argv], "")


@pytest.mark.parametrize("argv", [["deploy", "agent"], ["deploy"], ["agent", "web"], ["--version"]])
def test_deploy_is_ours(tmp_path: Path, ours: Path, argv: list[str]) -> None:
    status, out, err = run([ours, real(tmp_path / "real")], *argv)
    assert status in (0, 64) and not any("real" in line for line in out)
    assert argv == ["--version"] or "error: " in err


def test_without_another_program_we_say_what_we_are(tmp_path: Path, ours: Path) -> None:
    status, out, err = run([ours], "push", "main", "./result")
    assert (status, out) == (64, [])
    assert err == (
        "error: this `cachix` has the subcommand `deploy` only, and no other `cachix` is in PATH: "
        "install Cachix's client for that\n"
    )


def test_copies_of_ours_do_not_call_each_other_endlessly(tmp_path: Path, ours: Path) -> None:
    copy = script(tmp_path / "copy")
    status, _, err = run([ours, copy], "push", "main")
    assert status == 64 and "no other `cachix`" in err
    other = real(tmp_path / "real")
    assert run([ours, copy, other], "push", "main")[:2] == (7, [str(other), "push", "main"])


def test_a_command_of_the_real_one_may_call_cachix_again(tmp_path: Path, ours: Path) -> None:
    other = real(tmp_path / "real")
    expected = [str(other), "inner", str(other), "push", "again"]
    assert run([ours, other], "inner")[:2] == (7, expected)


def test_what_can_not_be_run_is_said(tmp_path: Path, ours: Path) -> None:
    other = real(tmp_path / "real")
    other.write_text("#!/nonexistent/interpreter\n")
    status, _, err = run([ours, other], "push")
    assert status == 64 and err == f"error: {other} can't be run: No such file or directory\n"


@pytest.mark.parametrize("program", ["cachix-deploy", "cachix-deploy.pyz", "python3"])
def test_under_another_name_nothing_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(cachix_other, "_become", lambda *_: pytest.fail("passed on"))
    cachix_other.hand_over(f"/usr/bin/{program}", ["push", "x"])

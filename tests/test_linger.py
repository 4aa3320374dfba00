"""The warning to a user's agent that ends when he logs out."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from activate.agent import linger

NAME, USER = pwd.getpwuid(os.getuid()).pw_name, os.getuid()
SERVICE = f"0::/user.slice/user-{USER}.slice/user@{USER}.service/app.slice/cachix-deploy.service\n"


@pytest.mark.parametrize(
    ("group", "lingers", "warns"),
    [
        (SERVICE, False, True),
        (SERVICE, True, False),
        (f"1:name=systemd:/user.slice/user@{USER}.service/x.scope\n0::/\n", False, True),
        ("0::/system.slice/cachix-deploy.service\n", False, False),
        (f"0::/user.slice/user-{USER}.slice/session-3.scope\n", False, False),
        (f"0::/user.slice/user@{USER + 1}.service/app.slice/x.service\n", False, False),
        ("", False, False),
        (None, False, False),
    ],
)
def test_a_users_service_is_warned_unless_he_lingers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str | None, lingers: bool, warns: bool
) -> None:
    if group is not None:
        (tmp_path / "cgroup").write_text(group)
    if lingers:
        (tmp_path / NAME).touch()
    monkeypatch.setattr(linger, "CONTROL_GROUP", str(tmp_path / "cgroup"))
    monkeypatch.setattr(linger, "LINGERING", str(tmp_path))
    problem = linger.problem()
    assert (problem is not None) == warns
    assert problem is None or f"`loginctl enable-linger {NAME}`" in problem

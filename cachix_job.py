"""The source of an order: commit and CI job. docs/protocol.rst has its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Optional

MAX_WORDS = 300  # characters of a text for people
MAX_LINK = 1000  # of a URL
MAX_EVENT = 8 << 20  # bytes of GitHub's description of an event
COMMIT = re.compile(r"[0-9a-f]{7,64}")


def source(environment: Mapping[str, str], message: Optional[str] = None) -> dict[str, str]:
    """The commit and the job that a CI system names; `message` is the title in its place.

    Empty outside of CI without a message. Nothing but these variables is read, and the file in
    which GitHub describes the event.
    """
    words: dict[str, str] = {}
    if environment.get("GITHUB_SHA"):
        words = _github(environment)
    elif environment.get("BUILDKITE_COMMIT"):
        words = _buildkite(environment)
    elif environment.get("CI_COMMIT_SHA"):
        is_woodpecker = environment.get("CI") == "woodpecker"
        words = _woodpecker(environment) if is_woodpecker else _gitlab(environment)
    return _cleaned({**words, "title": message or words.get("title", "")})


def _github(environment: Mapping[str, str]) -> dict[str, str]:
    commit = environment["GITHUB_SHA"]
    server, repository, run = (
        environment.get(name, "")
        for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    )
    place = f"{server}/{repository}" if server and repository else ""
    return {
        "commit": commit,
        "branch": environment.get("GITHUB_REF_NAME", ""),
        "title": _github_title(environment.get("GITHUB_EVENT_PATH", ""), commit),
        "url": f"{place}/commit/{commit}" if place else "",
        "job": f"{place}/actions/runs/{run}" if place and run else "",
        "actor": environment.get("GITHUB_ACTOR", ""),
    }


def _github_title(path: str, commit: str) -> str:
    """The first line of the commit's message, where the event's file has that commit."""
    try:
        with open(path, "rb") as file:
            record: Any = json.loads(file.read(MAX_EVENT))
        head = record["head_commit"]
        return _first_line(head["message"]) if head["id"] == commit else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _gitlab(environment: Mapping[str, str]) -> dict[str, str]:
    commit, place = environment["CI_COMMIT_SHA"], environment.get("CI_PROJECT_URL", "")
    return {
        "commit": commit,
        "branch": environment.get("CI_COMMIT_BRANCH", ""),
        "title": environment.get("CI_COMMIT_TITLE", ""),
        "url": f"{place}/-/commit/{commit}" if place else "",
        "job": environment.get("CI_JOB_URL", ""),
        "actor": environment.get("GITLAB_USER_LOGIN", ""),
    }


def _woodpecker(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "commit": environment["CI_COMMIT_SHA"],
        "branch": environment.get("CI_COMMIT_BRANCH", ""),
        "title": _first_line(environment.get("CI_COMMIT_MESSAGE", "")),
        "url": environment.get("CI_PIPELINE_FORGE_URL", ""),
        "job": environment.get("CI_PIPELINE_URL", ""),
        "actor": environment.get("CI_COMMIT_AUTHOR", ""),
    }


def _buildkite(environment: Mapping[str, str]) -> dict[str, str]:
    """Buildkite knows no page of the commit, and before a checkout the commit may be HEAD."""
    commit, job = environment["BUILDKITE_COMMIT"], environment.get("BUILDKITE_BUILD_URL", "")
    step = environment.get("BUILDKITE_JOB_ID", "")
    return {
        "commit": commit if COMMIT.fullmatch(commit) else "",
        "branch": environment.get("BUILDKITE_BRANCH", ""),
        "title": _first_line(environment.get("BUILDKITE_MESSAGE", "")),
        "job": f"{job}#{step}" if job and step else job,
        "actor": environment.get("BUILDKITE_BUILD_CREATOR", ""),
    }


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _cleaned(words: dict[str, str]) -> dict[str, str]:
    """Those that say something, as text of one line that can be sent."""
    texts = {}
    for name, value in words.items():
        text = " ".join(value.encode("utf-8", "replace").decode().replace("\0", "").split())
        most = MAX_LINK if name in ("url", "job") else MAX_WORDS
        is_whole = len(text) <= most or most == MAX_WORDS  # half a link leads elsewhere
        if text and is_whole:
            texts[name] = text[:most]
    return texts

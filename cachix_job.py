"""What the CI job that deploys says about itself: docs/protocol.rst has the words."""

from __future__ import annotations

from collections.abc import Mapping

MAX_WORDS = 300  # characters of a text for people
MAX_LINK = 1000  # of a URL


def source(environment: Mapping[str, str]) -> dict[str, str]:
    """The commit and the job that GitHub or GitLab names; empty outside of both.

    Nothing but these variables is read.
    """
    if environment.get("GITHUB_SHA"):
        return _cleaned(_github(environment))
    if environment.get("CI_COMMIT_SHA"):
        return _cleaned(_gitlab(environment))
    return {}


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
        "url": f"{place}/commit/{commit}" if place else "",
        "job": f"{place}/actions/runs/{run}" if place and run else "",
    }


def _gitlab(environment: Mapping[str, str]) -> dict[str, str]:
    commit, place = environment["CI_COMMIT_SHA"], environment.get("CI_PROJECT_URL", "")
    return {
        "commit": commit,
        "branch": environment.get("CI_COMMIT_BRANCH", ""),
        "title": environment.get("CI_COMMIT_TITLE", ""),
        "url": f"{place}/-/commit/{commit}" if place else "",
        "job": environment.get("CI_JOB_URL", ""),
    }


def _cleaned(words: dict[str, str]) -> dict[str, str]:
    """Those that say something, as text of one line that can be sent."""
    found = {}
    for name, value in words.items():
        text = " ".join(value.encode("utf-8", "replace").decode().replace("\0", "").split())
        most = MAX_LINK if name in ("url", "job") else MAX_WORDS
        is_whole = len(text) <= most or most == MAX_WORDS  # half a link leads elsewhere
        if text and is_whole:
            found[name] = text[:most]
    return found

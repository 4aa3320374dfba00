"""The source that a CI job sends, by the variables of each CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cachix_job
from cachix_workspace.runs import MAX_WORDS, Source

COMMIT = "a1b2c3d4" * 5
GITHUB = {
    "GITHUB_SHA": COMMIT,
    "GITHUB_REF_NAME": "main",
    "GITHUB_SERVER_URL": "https://github.example",
    "GITHUB_REPOSITORY": "acme/machines",
    "GITHUB_RUN_ID": "1234",
    "GITHUB_ACTOR": "anna",
}
GITLAB = {
    "CI_COMMIT_SHA": COMMIT,
    "CI_COMMIT_BRANCH": "main",
    "CI_COMMIT_TITLE": "Mend the \u00fcbersicht",
    "CI_PROJECT_URL": "https://gitlab.example/acme/machines",
    "CI_JOB_URL": "https://gitlab.example/acme/machines/-/jobs/7",
    "GITLAB_USER_LOGIN": "anna",
}
WOODPECKER = {
    "CI_COMMIT_SHA": COMMIT,
    "CI": "woodpecker",
    "CI_COMMIT_BRANCH": "main",
    "CI_COMMIT_MESSAGE": "Mend the roof\n\nIt rained.",
    "CI_COMMIT_AUTHOR": "anna",
    "CI_PIPELINE_FORGE_URL": f"https://forge.example/acme/machines/commit/{COMMIT}",
    "CI_PIPELINE_URL": "https://woodpecker.example/repos/3/pipeline/7",
}
BUILDKITE = {
    "BUILDKITE_COMMIT": COMMIT,
    "BUILDKITE_BRANCH": "main",
    "BUILDKITE_MESSAGE": "Mend the roof\n\nIt rained.",
    "BUILDKITE_BUILD_CREATOR": "Anna",
    "BUILDKITE_BUILD_URL": "https://buildkite.example/acme/machines/builds/7",
    "BUILDKITE_JOB_ID": "0191",
}


def test_github() -> None:
    assert cachix_job.source({**GITHUB, "PATH": "/bin", "GITHUB_TOKEN": "secret"}) == {
        "commit": COMMIT,
        "branch": "main",
        "url": f"https://github.example/acme/machines/commit/{COMMIT}",
        "job": "https://github.example/acme/machines/actions/runs/1234",
        "actor": "anna",
    }


@pytest.mark.parametrize(
    ("event", "title"),
    [
        ({"head_commit": {"id": COMMIT, "message": "Mend it\n\nIt rained."}}, "Mend it"),
        ({"head_commit": {"id": COMMIT, "message": "\n\u001b[2J::error::x"}}, "\x1b[2J::error::x"),
        ({"head_commit": {"id": "f" * 40, "message": "Another one"}}, None),
        ({"head_commit": {"id": COMMIT, "message": 7}}, None),
        ({"head_commit": {"id": COMMIT, "message": "  "}}, None),
        ({"head_commit": None}, None),
        ([], None),
        ("not JSON", None),
    ],
)
def test_the_title_of_github(tmp_path: Path, event: Any, title: str | None) -> None:
    path = tmp_path / "event.json"
    path.write_text(event if isinstance(event, str) else json.dumps(event))
    assert cachix_job.source({**GITHUB, "GITHUB_EVENT_PATH": str(path)}).get("title") == title
    for other in (tmp_path, tmp_path / "missing"):
        assert "title" not in cachix_job.source({**GITHUB, "GITHUB_EVENT_PATH": str(other)})


def test_gitlab() -> None:
    assert cachix_job.source({**GITLAB, "CI_JOB_TOKEN": "secret"}) == {
        "commit": COMMIT,
        "branch": "main",
        "title": "Mend the \u00fcbersicht",
        "url": f"https://gitlab.example/acme/machines/-/commit/{COMMIT}",
        "job": "https://gitlab.example/acme/machines/-/jobs/7",
        "actor": "anna",
    }


def test_woodpecker() -> None:
    assert cachix_job.source({**WOODPECKER, "CI_NETRC_PASSWORD": "secret"}) == {
        "commit": COMMIT,
        "branch": "main",
        "title": "Mend the roof",
        "url": f"https://forge.example/acme/machines/commit/{COMMIT}",
        "job": "https://woodpecker.example/repos/3/pipeline/7",
        "actor": "anna",
    }


def test_buildkite() -> None:
    assert cachix_job.source({**BUILDKITE, "BUILDKITE_REPO": "https://x:secret@git.example"}) == {
        "commit": COMMIT,
        "branch": "main",
        "title": "Mend the roof",
        "job": "https://buildkite.example/acme/machines/builds/7#0191",
        "actor": "Anna",
    }
    assert "commit" not in cachix_job.source({**BUILDKITE, "BUILDKITE_COMMIT": "HEAD"})


@pytest.mark.parametrize("environment", [{}, GITHUB, GITLAB, WOODPECKER, BUILDKITE])
def test_a_message_is_the_title(environment: dict[str, str]) -> None:
    rest = {**cachix_job.source(environment), "title": "By hand"}
    assert cachix_job.source(environment, "By\nhand") == rest


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}, {"GITHUB_SHA": ""}])
def test_elsewhere_nothing_is_said(environment: dict[str, str]) -> None:
    assert cachix_job.source(environment) == {}


@pytest.mark.parametrize("full", [GITHUB, GITLAB, WOODPECKER, BUILDKITE])
def test_what_is_not_known_is_left_out(full: dict[str, str]) -> None:
    for name in full:
        rest = cachix_job.source({**full, name: ""})
        assert set(rest) <= set(cachix_job.source(full)) and "" not in rest.values()
    first = next(iter(full))
    assert cachix_job.source({first: COMMIT}) == {"commit": COMMIT}


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("two\nlines\t\x00", "two lines"),
        ("  ", None),
        ("\udcff\ud800", "??"),
        ("x" * 5000, "x" * MAX_WORDS),
    ],
)
def test_any_text_can_be_sent_and_is_taken_by_the_workspace(title: str, words: str | None) -> None:
    texts = cachix_job.source({**GITLAB, "CI_COMMIT_TITLE": title})
    assert texts.get("title") == words
    source = Source.from_json(texts)
    assert source is not None
    assert (source.title, source.url, source.job) == (words or "", texts["url"], texts["job"])


def test_half_a_link_is_none() -> None:
    texts = cachix_job.source({**GITLAB, "CI_JOB_URL": "https://g.example/" + "x" * 2000})
    assert "job" not in texts and "url" in texts

"""What a CI job says about itself: by the variables of GitHub and of GitLab, and no others."""

from __future__ import annotations

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
}
GITLAB = {
    "CI_COMMIT_SHA": COMMIT,
    "CI_COMMIT_BRANCH": "main",
    "CI_COMMIT_TITLE": "Mend the \u00fcbersicht",
    "CI_PROJECT_URL": "https://gitlab.example/acme/machines",
    "CI_JOB_URL": "https://gitlab.example/acme/machines/-/jobs/7",
}


def test_github() -> None:
    assert cachix_job.source({**GITHUB, "PATH": "/bin", "GITHUB_TOKEN": "secret"}) == {
        "commit": COMMIT,
        "branch": "main",
        "url": f"https://github.example/acme/machines/commit/{COMMIT}",
        "job": "https://github.example/acme/machines/actions/runs/1234",
    }


def test_gitlab() -> None:
    assert cachix_job.source({**GITLAB, "CI_JOB_TOKEN": "secret"}) == {
        "commit": COMMIT,
        "branch": "main",
        "title": "Mend the \u00fcbersicht",
        "url": f"https://gitlab.example/acme/machines/-/commit/{COMMIT}",
        "job": "https://gitlab.example/acme/machines/-/jobs/7",
    }


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}, {"GITHUB_SHA": ""}])
def test_elsewhere_nothing_is_said(environment: dict[str, str]) -> None:
    assert cachix_job.source(environment) == {}


@pytest.mark.parametrize("full", [GITHUB, GITLAB])
def test_what_is_not_known_is_left_out(full: dict[str, str]) -> None:
    for name in full:
        rest = cachix_job.source({**full, name: ""})
        assert set(rest) < set(cachix_job.source(full)) and "" not in rest.values()
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
    found = cachix_job.source({**GITLAB, "CI_COMMIT_TITLE": title})
    assert found.get("title") == words
    said = Source.from_json(found)
    assert said is not None
    assert (said.title, said.url, said.job) == (words or "", found["url"], found["job"])


def test_half_a_link_is_none() -> None:
    found = cachix_job.source({**GITLAB, "CI_JOB_URL": "https://g.example/" + "x" * 2000})
    assert "job" not in found and "url" in found

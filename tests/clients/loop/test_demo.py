"""`heedful demo`: the order of the story, and that its rater is called simulated."""

import json
import os
import subprocess
import sys

import pytest

MAIN = "from heedful.cli import main; main()"
FINISHED = {"stage": "done", "status": "finished", "candidate_version": "v1"}


@pytest.fixture
def demo(server, tmp_path):
    """Runs `heedful demo` beside a `heedful-trainer` that writes down what it was given."""
    (tmp_path / "heedful").write_text(MAIN)
    program = tmp_path / "heedful-trainer"
    program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/given\nexit ${{EXIT:-0}}\n')
    program.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, tmp_path / "heedful", "demo", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={
                **os.environ,
                "HEEDFUL_TARGET": server.target,
                "HEEDFUL_HOME": str(tmp_path),
                **environment,
            },
        )

    return run


def plan(loop, verdict: str) -> None:
    loop.plan = [{"status": "running", "stage": "policy"}, {**FINISHED, "verdict": verdict}]


def test_the_whole_story(demo, loop, script, tmp_path, server):
    plan(loop, "inconclusive")
    done = demo("--comparisons", "5")
    assert done.returncode == 0, done.stderr
    story = done.stdout
    order = (
        "The rater is SIMULATED",
        "Before: what the champion answers",
        "5 blind pairs, judged by the simulated rater",
        "v1 is safe to try",
        "champion beside v1",
        "v1 is champion now instead of base (approved)",
        "base is champion again; v1 is rolled back",
    )
    places = [story.index(text) for text in order]
    assert places == sorted(places)
    given = (tmp_path / "given").read_text()
    target = f"--project demo-brief --target {server.target}"
    assert given.splitlines() == [
        f"simulate --taste brief --comparisons 5 {target}",
        f"simulate --taste brief --judge v1 --against champion --prompts 100 {target}",
    ]
    assert {request.project for request in script.requests} == {"demo-brief"}
    assert {request.project for request in loop.requests} == {"demo-brief"}


def test_as_json_it_says_that_the_rater_is_simulated(demo, loop):
    plan(loop, "pass")
    document = json.loads(demo("--taste", "numbers", "--json").stdout)
    assert (document["rater"], document["project"]) == ("simulated", "demo-numbers")
    assert document["promoted"]["verdict"] == "proven"
    assert document["rolled_back"]["to_version"] == "base"
    assert set(document["seconds"]) == {
        *("before", "votes", "refresh", "diff", "judge", "promote", "roll_back"),
    }


def test_what_failed_the_gate_is_not_promoted(demo, loop):
    plan(loop, "fail")
    done = demo()
    assert "it is not promoted: HEEDFUL_PROJECT=demo-brief heedful gate explain v1" in done.stdout
    assert loop.log == []


def test_a_rater_that_cannot_vote_ends_the_story(demo, loop):
    done = demo(EXIT="4")
    assert done.returncode == 4
    assert loop.runs == {}

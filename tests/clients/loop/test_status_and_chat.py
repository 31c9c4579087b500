"""`heedful status` and `heedful chat` say who answers and what is being learned."""

import json

import pytest
from heedful_proto.v1 import feedback_pb2 as fpb


@pytest.fixture
def learning(loop, memory):
    loop.add("v2", "challenger", verdict="inconclusive")
    loop.aliases["challenger"] = "v2"
    return loop


def test_status_shows_champion_challenger_backlog_and_run(run, learning):
    answer = json.loads(run("generate", "x", "--json").stdout)["completions"][0]
    run("feedback", "add", answer["completion_id"], "--up")
    learning.plan = [{"status": "running", "stage": "policy", "stage_progress": 0.25}]
    run("refresh", "--no-trainer", "--no-follow")
    shown = " ".join(run("status").stdout.split())
    assert "champion base" in shown
    assert "challenger v2 (2 h old, inconclusive)" in shown
    assert "backlog 1 judgements not trained on yet" in shown
    assert "refresh run-1 " in shown


def test_status_as_json(run, learning):
    document = json.loads(run("status", "--json").stdout)
    assert document["models"]["aliases"]["challenger"] == "v2"
    assert document["learning"] == {"backlog": 0, "refresh": None}


def test_chat_takes_a_version_and_shows_who_answered(run, loop, script):
    done = run("chat", "--model", "v2", stdin="one\n/model v3\ntwo\n/model\nthree\n")
    assert [request.model for request in script.requests] == ["v2", "v3", ""]
    assert "base · Echo-1" in done.stderr
    assert "v3 answers" in done.stderr
    assert "the champion answers" in done.stderr


def test_a_comparison_in_chat_draws_from_the_version(run, memory):
    run("chat", "--compare", "--model", "v2", stdin="one\na\n")
    assert list(memory.of(fpb.CompareRequest)[0].models) == ["v2"]

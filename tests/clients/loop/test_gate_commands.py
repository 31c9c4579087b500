"""`heedful gate`: evidence as tables and sentences, and blind votes that stay blind to the end."""

import json

import pytest
from heedful.cli import blind_pairs
from heedful_proto.v1 import feedback_pb2 as fpb


@pytest.fixture
def judged(loop, report):
    loop.add("v1", "challenger", verdict="inconclusive")
    loop.aliases["challenger"] = "v1"
    loop.evidence["v1"] = {"gate": report}


@pytest.mark.usefixtures("judged")
def test_explain_shows_stages_checks_and_a_sentence(run):
    shown = run("gate", "explain").stdout
    assert "The gate could not tell about v1: win rate. Nothing speaks against it" in shown
    assert "1 · integrity: is it whole, and does it end its answers: pass" in shown
    assert "3 · canary: blind votes between it and the champion: skipped" in shown
    line = next(line for line in shown.splitlines() if line.startswith("win rate"))
    assert line.split()[:6] == ["win", "rate", "inconclusive", "0.58", "0.5", "40"]
    assert "0.43 to 0.72" in line
    assert "the interval holds 50 %" in line


def test_explain_names_what_passed_and_shows_it_on_request(run, loop):
    checks = [{"name": name, "verdict": "pass", "value": 0.5} for name in ("files", "origin")]
    report = {"verdict": "pass", "stages": [{"name": "integrity", "checks": checks}]}
    loop.add("v1", "challenger", verdict="pass")
    loop.evidence["v1"] = report
    assert "passed: files, origin" in run("gate", "explain", "v1").stdout
    whole = run("gate", "explain", "v1", "--all").stdout
    assert "passed:" not in whole
    assert any(line.split()[:3] == ["files", "pass", "0.5"] for line in whole.splitlines())


@pytest.mark.usefixtures("judged")
def test_explain_as_json_is_the_report(run, report):
    assert json.loads(run("gate", "explain", "v1", "--json").stdout) == report


def test_what_cannot_be_overridden_is_said(run, loop):
    check = {"name": "endings", "verdict": "fail", "overridable": False}
    stage = {"name": "integrity", "verdict": "fail", "checks": [check]}
    report = {"verdict": "fail", "action": "reject", "overridable": False, "stages": [stage]}
    loop.add("v1", "rejected", verdict="fail")
    loop.evidence["v1"] = report
    shown = run("gate", "explain", "v1").stdout
    assert "v1 failed the gate: endings. It is rejected." in shown
    assert "cannot be overridden" in shown


def test_a_version_that_was_never_judged(run, loop):
    assert run("gate", "explain", "base").stdout == "base was never judged by the gate\n"
    assert run("gate", "explain", "base", "--json").stdout == "null\n"


@pytest.fixture
def voters(judged, memory):
    return memory


def test_votes_are_blind_until_the_end(run, voters):
    done = run("gate", "vote", "3", stdin="one\na\ntwo\nt\nthree\nn\n")
    assert done.exit_code == 0
    requests = voters.of(fpb.CompareRequest)
    assert [request.purpose for request in requests] == [fpb.COMPARISON_PURPOSE_GATE] * 3
    assert all(list(request.models) == [] for request in requests)
    assert len(voters.events) == 3
    before_the_end = done.stdout.rpartition("3 votes")[0]
    assert "v1" not in before_the_end
    assert "base preferred 1, v1 preferred 0, 1 tied, 1 with no good answer" in done.stdout
    assert "heedful models promote v1" in done.stderr


def test_votes_on_prompts_of_a_file(run, voters, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    done = run("gate", "vote", "2", "--prompts", str(file), "--json", stdin="b\ns\n")
    tally = json.loads(done.stdout[done.stdout.index("{") :])
    assert tally["wins"] == {"v1": 1, "base": 0}
    assert (tally["votes"], tally["skipped"]) == (1, 1)


def test_votes_on_prompts_of_the_log(run, voters):
    for text in ("first", "second", "first"):
        answer = run("generate", text, "--json")
        name = json.loads(answer.stdout)["completions"][0]["completion_id"]
        assert run("feedback", "add", name, "--up").exit_code == 0
    run("gate", "vote", "--from-log", "2", stdin="a\na\n")
    prompts = [bytes(r.prompt.token_ids.ids).decode() for r in voters.of(fpb.CompareRequest)]
    assert prompts == ["second", "first"]


def test_without_a_challenger_there_is_nothing_to_vote_on(run, loop):
    done = run("gate", "vote")
    assert done.exit_code == 1
    assert "heedful refresh" in done.stderr


def test_diff_with_votes_is_blind_and_names_both(run, voters):
    done = run("models", "diff", "base", "v1", "one", "--vote", stdin="b\n")
    request = voters.of(fpb.CompareRequest)[0]
    assert list(request.models) == ["base", "v1"]
    assert request.purpose == fpb.COMPARISON_PURPOSE_GATE
    assert "1 votes: base preferred 0, v1 preferred 1" in done.stdout


def test_a_hidden_log_hides_the_winner_only(run, voters):
    voters.hide_completions = True
    done = run("gate", "vote", "1", stdin="one\nt\n")
    assert "1 votes: 1 tied" in done.stdout


def test_the_interval_is_wilsons():
    assert blind_pairs.wilson(0, 0) == (0.0, 1.0)
    low, high = blind_pairs.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)

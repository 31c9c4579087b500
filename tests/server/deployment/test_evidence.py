"""What the gate's report allows, and the card that is made of it."""

from typing import Any

import pytest
from heedful_server.deployment import evidence
from heedful_server.deployment.card import model_card
from heedful_server.deployment.served import is_part, run_adapter
from heedful_server.deployment.votes import Vote, tally
from heedful_store import PolicyVersion, Run, Scope


def policy(**fields: Any) -> PolicyVersion:
    defaults: dict[str, Any] = {
        "scope": Scope(),
        "version": "v1",
        "content_hash": "a" * 64,
        "base_id": "b@1",
    }
    return PolicyVersion(**(defaults | fields))


def run(**fields: Any) -> Run:
    return Run(run_id="r", scope=Scope(), **fields)


def stage(name: str, *checks: dict[str, Any], verdict: str = "pass") -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "checks": list(checks)}


def test_the_report_is_found_in_the_card_then_in_the_run() -> None:
    one, two = {"verdict": "pass"}, {"verdict": "fail"}
    made = run(evidence={"gate": {"report": two}})
    assert evidence.gate_report(policy(card={"gate": one}), made) == one
    assert evidence.gate_report(policy(), made) == two
    assert evidence.gate_report(policy(), run(evidence={"gate": one})) == one
    assert evidence.gate_report(policy(card={"gate": "soon"}), None) == {}


@pytest.mark.parametrize(
    ("stages", "is_refused"),
    [
        ([], False),
        ([stage("offline", {"name": "x", "verdict": "fail"}, verdict="fail")], False),
        ([stage("offline", {"name": "x", "verdict": "fail", "overridable": False})], True),
        ([stage("integrity", {"name": "x", "verdict": "fail", "overridable": True})], True),
        ([stage("integrity", verdict="fail")], True),
        ([stage("safety", {"name": "x", "verdict": "fail"})], True),
        ([stage("integrity", {"name": "x", "verdict": "inconclusive"})], False),
        (["odd", {"checks": "odd"}, {"checks": ["odd"]}], False),
        ("odd", False),
    ],
)
def test_integrity_and_safety_cannot_be_waived(stages: Any, is_refused: bool) -> None:
    assert bool(evidence.refusal(policy(), {"stages": stages})) is is_refused


def test_a_summary_keeps_what_has_a_number_behind_it() -> None:
    check = {"name": "win rate", "verdict": "pass", "value": 0.6, "n": 30, "interval": [0.5, 0.7]}
    found = evidence.summary(
        policy(verdict="pass"), {"stages": [stage("offline", check, {"name": "n0", "n": 0})]}
    )
    assert found == {"verdict": "pass", "checks": [check]}


def test_a_card_shows_where_a_version_comes_from_and_lets_nothing_break_out() -> None:
    made = run(dataset_id="d" * 8, from_log_seq=1, to_log_seq=9, seeds={"split": 7})
    text = model_card(
        policy(card={"counts": {"pairs": 12}, "note": "a|b\n# c"}, tainted_at_ms=0), made, {}
    )
    assert "| counts.pairs | 12 |" in text
    assert r"| note | a\|b # c |" in text
    assert "log positions 1 to 9" in text
    assert "- seed split: 7" in text
    assert "erased on 1970-01-01" in text


def test_votes_add_up_by_rater_and_prompt() -> None:
    votes = [Vote("a", "p", 1), Vote("a", "q", -1), Vote("b", "p", 1), Vote("c", "p", 0)]
    found = tally("v2", "v1", votes)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert (found.raters, found.prompts, found.raters_for, found.raters_against) == (3, 2, 1, 0)
    assert tally("v2", "v1", []).win_rate is None
    assert tally("v2", "v1", []).to_json()["interval"] == [0.0, 1.0]


@pytest.mark.parametrize("text", ["", ".", "..", ".x", "a/b", "a\\b", "a\0", "a\n", "é", "x" * 65])
def test_what_could_leave_its_directory_is_no_name(text: str) -> None:
    assert not is_part(text)
    assert run_adapter(Scope(), f"run:{text}/a") is None
    assert run_adapter(Scope(), f"run:a/{text}") is None


def test_a_name_of_a_run_is_read_back() -> None:
    found = run_adapter(Scope(), "run:01a2-b/policy_1.x")
    assert found is not None
    assert found.model == "run:01a2-b/policy_1.x"
    assert run_adapter(Scope(), "v1") is None

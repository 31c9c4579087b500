"""Who may be promoted, by mode and profile, and what can never be promoted."""

import dataclasses

import pytest
from heedful_trainer.gate.promotion import canary_stage, promotion_stage, stage_verdict
from heedful_trainer.gate.settings import StatisticsSettings
from heedful_trainer.gate.types import (
    CanaryEvidence,
    Check,
    FeedbackCounts,
    GateInputs,
    StageResult,
    Verdict,
)

STATISTICS = StatisticsSettings()
INPUTS = GateInputs(
    "run", "/dir", "run:run/a", "base-id", "template", feedback=FeedbackCounts(comparisons=50)
)


def stages(offline: Verdict, canary: Verdict = "skipped") -> tuple[StageResult, ...]:
    return (
        StageResult("integrity", "pass"),
        StageResult("offline", offline),
        StageResult("canary", canary),
    )


def judged(offline: Verdict, canary: Verdict = "skipped", **changes: object) -> tuple[str, str]:
    inputs = dataclasses.replace(INPUTS, **changes)
    _, verdict, action = promotion_stage(inputs, stages(offline, canary), STATISTICS)
    return verdict, action


@pytest.mark.parametrize("mode", ["auto", "approve", "shadow"])
def test_a_failure_is_rejected_in_every_mode(mode: str) -> None:
    assert judged("fail", mode=mode) == ("fail", "reject")
    assert judged("pass", "fail", mode=mode) == ("fail", "reject")


def test_only_auto_promotes_by_itself_and_only_what_is_proven() -> None:
    assert judged("pass", mode="auto") == ("pass", "promote")
    assert judged("pass", mode="approve") == ("pass", "ask")
    assert judged("pass", mode="shadow") == ("pass", "keep")
    assert judged("inconclusive", mode="auto") == ("inconclusive", "keep")
    assert judged("inconclusive", mode="approve") == ("inconclusive", "ask")
    assert judged("pass", "inconclusive", mode="auto") == ("inconclusive", "keep")


def test_thumbs_alone_never_promote_by_themselves() -> None:
    thumbs = FeedbackCounts(thumbs=5000, raters=900)
    assert judged("pass", mode="auto", feedback=thumbs) == ("inconclusive", "keep")
    assert judged("pass", mode="approve", feedback=thumbs) == ("pass", "ask")
    mixed = dataclasses.replace(thumbs, corrections=1)
    assert judged("pass", mode="auto", feedback=mixed) == ("pass", "promote")


def test_profile_public_needs_different_people() -> None:
    few = FeedbackCounts(comparisons=500, raters=4)
    assert judged("pass", mode="auto", profile="public", feedback=few) == ("inconclusive", "keep")
    assert judged("pass", mode="auto", profile="team", feedback=few) == ("pass", "promote")
    enough = dataclasses.replace(few, raters=5)
    assert judged("pass", mode="auto", profile="public", feedback=enough) == ("pass", "promote")


def test_a_rebuild_that_is_not_worse_goes_ahead() -> None:
    assert judged("pass", mode="approve", kind="rebuild") == ("pass", "promote")
    thumbs = FeedbackCounts(thumbs=10)
    assert judged("pass", mode="auto", kind="rebuild", feedback=thumbs) == ("pass", "promote")
    assert judged("inconclusive", mode="auto", kind="rebuild") == ("inconclusive", "keep")
    assert judged("pass", mode="shadow", kind="rebuild") == ("pass", "keep")


def test_integrity_alone_proves_nothing() -> None:
    only = (StageResult("integrity", "pass"),)
    _, verdict, _ = promotion_stage(INPUTS, only, STATISTICS)
    assert verdict == "inconclusive"


def test_a_stage_passes_where_every_benefit_is_proven_and_nothing_failed() -> None:
    proof = Check("proof", "pass", proves_benefit=True)
    guard = Check("guard", "pass")
    skipped = Check("guard", "skipped")
    assert stage_verdict([proof, guard, skipped]) == "pass"
    assert stage_verdict([proof, Check("guard", "fail")]) == "fail"
    for unproven in ("skipped", "inconclusive"):
        assert stage_verdict([dataclasses.replace(proof, verdict=unproven)]) == "inconclusive"


def test_canary_decides_at_one_over_the_level() -> None:
    assert canary_stage(None, STATISTICS).verdict == "skipped"
    votes = CanaryEvidence(30, 10, 4, 20, benefit_e_value=19.0, harm_e_value=0.1)
    assert canary_stage(votes, STATISTICS).verdict == "inconclusive"
    better = dataclasses.replace(votes, benefit_e_value=20.0)
    assert canary_stage(better, STATISTICS).verdict == "pass"
    worse = dataclasses.replace(better, harm_e_value=20.0)
    assert canary_stage(worse, STATISTICS).verdict == "fail"
    none = dataclasses.replace(votes, wins=0, losses=0, ties=0)
    assert canary_stage(none, STATISTICS).verdict == "skipped"

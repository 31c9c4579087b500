"""Stages 3 and 4, canary and promotion: what follows from the evidence, by mode and profile.

Owns who may promote what: nothing is promoted over a failure of integrity or safety, an
inconclusive candidate never by itself, and thumbs alone never by themselves. It moves no alias; the
server does. Pure, any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from heedful_trainer.gate.settings import StatisticsSettings
from heedful_trainer.gate.types import (
    Action,
    CanaryEvidence,
    Check,
    GateInputs,
    StageResult,
    Verdict,
)


def stage_verdict(checks: Sequence[Check]) -> Verdict:
    """Return what follows from a stage's checks.

    It passes where nothing failed and every question of benefit was answered with yes; a protecting
    check that was skipped says so, and holds nothing up.
    """
    if any(check.verdict == "fail" for check in checks):
        return "fail"
    proofs = [check.verdict for check in checks if check.proves_benefit]
    unproven = any(verdict != "pass" for verdict in proofs)
    if unproven or any(check.verdict == "inconclusive" for check in checks):
        return "inconclusive"
    return "pass"


def canary_stage(canary: CanaryEvidence | None, statistics: StatisticsSettings) -> StageResult:
    """Return what blind votes on live traffic say."""
    if canary is None or canary.wins + canary.losses + canary.ties == 0:
        return StageResult("canary", "skipped", detail="n too small: no blind votes were collected")
    threshold = 1 / statistics.level
    votes = canary.wins + canary.losses + canary.ties
    share = (canary.wins + canary.ties / 2) / votes
    verdict: Verdict = "inconclusive"
    if canary.harm_e_value >= threshold:
        verdict = "fail"
    elif canary.benefit_e_value >= threshold:
        verdict = "pass"
    check = Check(
        "blind votes",
        verdict,
        value=share,
        limit=0.5,
        n=canary.raters,
        detail=(
            f"{canary.wins} won, {canary.losses} lost, {canary.ties} tied; evidence "
            f"{canary.benefit_e_value:.3g} for better, {canary.harm_e_value:.3g} for worse, "
            f"{threshold:.3g} decides"
        ),
    )
    return StageResult("canary", verdict, (check,))


def promotion_stage(
    inputs: GateInputs, before: Sequence[StageResult], statistics: StatisticsSettings
) -> tuple[StageResult, Verdict, Action]:
    """Return the last stage, the verdict over the candidate and what may be done with it."""
    verdict = _verdict(before)
    checks = _automatic_checks(inputs, statistics) if inputs.mode == "auto" else []
    held_back = [check.name for check in checks if check.verdict != "pass"]
    if verdict == "pass" and held_back:
        # Not the candidate's fault: a person may still promote it.
        verdict = "inconclusive"
    action, detail = _action(inputs, verdict, held_back)
    return StageResult("promotion", verdict, tuple(checks), detail), verdict, action


def _verdict(before: Sequence[StageResult]) -> Verdict:
    verdicts = {stage.name: stage.verdict for stage in before}
    if "fail" in verdicts.values():
        return "fail"
    if verdicts.get("offline") == "pass" and verdicts.get("canary") in ("pass", "skipped"):
        return "pass"
    return "inconclusive"


def _automatic_checks(inputs: GateInputs, statistics: StatisticsSettings) -> list[Check]:
    feedback = inputs.feedback
    thumbs_only = feedback.thumbs_only and inputs.kind == "refresh"
    checks = [
        Check(
            "more than thumbs",
            "inconclusive" if thumbs_only else "pass",
            detail=(
                f"learned from {feedback.comparisons} comparisons, {feedback.thumbs} thumbs and "
                f"{feedback.corrections} corrections; thumbs alone never promote by themselves"
            ),
        )
    ]
    if inputs.profile == "public" and inputs.kind == "refresh":
        least = statistics.min_public_raters
        checks.append(
            Check(
                "different raters",
                "pass" if feedback.raters >= least else "inconclusive",
                value=float(feedback.raters),
                limit=float(least),
                n=feedback.raters,
                detail="people whose feedback was learned from",
            )
        )
    return checks


def _action(inputs: GateInputs, verdict: Verdict, held_back: Sequence[str]) -> tuple[Action, str]:
    if verdict == "fail":
        return "reject", "a check failed: the champion stays"
    if inputs.mode == "shadow":
        return "keep", "mode shadow: judged and kept, never promoted"
    if verdict == "pass" and inputs.kind == "rebuild":
        return "promote", "a rebuild that is not worse replaces what must not be served any more"
    if inputs.mode == "approve":
        return "ask", "mode approve: a person decides"
    if held_back:
        return "keep", f"mode auto: not by itself ({', '.join(held_back)})"
    if verdict == "pass":
        return "promote", "mode auto: every stage passed"
    return "keep", "mode auto: inconclusive never promotes by itself"

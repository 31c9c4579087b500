"""Offline checks of benefit: whether the candidate is better by what people preferred.

Owns three statistics: how often the implicit reward log pi - log pi_ref orders held-out pairs as
their raters did, how often a judge prefers the candidate's answer over the champion's, and the same
at equal length. A pass is a test at the stated level; equal candidates pass it no more often than
that. For a rebuild the question is instead whether the candidate is worse by a margin. Pure
functions, any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from heedful_trainer.gate.judges import JudgeKind
from heedful_trainer.gate.settings import StatisticsSettings
from heedful_trainer.gate.statistics import (
    Paired,
    at_equal_length,
    non_inferior,
    outcome_of,
    paired,
)
from heedful_trainer.gate.types import Check, HoldoutPair, Profile, RunKind, Verdict

_LONGER_FROM = 1.1  # mean length ratio from which a win has to survive at equal length
_MARGIN_TIE = 1e-6  # nats; a candidate equal to its reference has margins of rounding only


def unit_of(profile: Profile, prompt_id: str, rater_id: str) -> str:
    """Return what counts as one observation: the prompt alone at home, else the rater."""
    return prompt_id if profile == "personal" or not rater_id else f"rater:{rater_id}"


def pair_accuracy(
    pairs: Sequence[HoldoutPair],
    profile: Profile,
    statistics: StatisticsSettings,
    kind: RunKind = "refresh",
) -> Check:
    """Return whether held-out pairs are ordered as their raters did, better than by chance."""
    judged = [pair for pair in pairs if not pair.tied]
    units = [unit_of(profile, pair.prompt_id, pair.rater_id) for pair in judged]
    name = "held-out pairs"
    if not all(math.isfinite(pair.margin) for pair in pairs):
        return Check(name, "fail", n=len(pairs), detail="a log-prob is not finite")
    if (short := _too_small(name, units, profile, statistics)) is not None:
        return short
    outcomes = [outcome_of(pair.margin, _MARGIN_TIE) for pair in judged]
    found = _paired(units, outcomes, statistics)
    detail = (
        f"share of {found.n} pairs whose chosen answer gained more than the rejected one "
        f"({len(pairs) - len(judged)} ties aside); p = {found.p_better:.3g}"
    )
    if kind == "rebuild":
        return _non_inferior_check(name, units, outcomes, found, statistics, detail)
    return _benefit_check(name, found, statistics, detail)


def win_rate(
    name: str,
    judge_kind: JudgeKind,
    units: Sequence[str],
    differences: Sequence[float],
    tie_width: float,
    statistics: StatisticsSettings,
    *,
    profile: Profile,
    kind: RunKind = "refresh",
) -> Check:
    """Return whether a judge prefers the candidate's answers.

    A judge on another backbone may forbid but need not be convinced: it is weaker by construction.

    Args:
        name: of the check.
        judge_kind: which judge it is.
        units: what counts as one observation, for each prompt.
        differences: the judge's score of the candidate's answer less that of the champion's.
        tie_width: differences up to this are ties.
        statistics: levels.
        profile: of the project.
        kind: refresh asks for a benefit, rebuild for no loss.
    """
    if not all(math.isfinite(value) for value in differences):
        return Check(name, "fail", n=len(differences), detail="a score is not finite")
    if (short := _too_small(name, units, profile, statistics)) is not None:
        return short
    outcomes = [outcome_of(value, tie_width) for value in differences]
    found = _paired(units, outcomes, statistics)
    wins, ties = outcomes.count(1.0), outcomes.count(0.5)
    detail = (
        f"{wins} won, {len(outcomes) - wins - ties} lost, {ties} tied; p = {found.p_better:.3g}"
    )
    if kind == "rebuild":
        return _non_inferior_check(name, units, outcomes, found, statistics, detail)
    if judge_kind == "reward_model":
        return _benefit_check(name, found, statistics, detail)
    harmful = found.p_worse <= statistics.level
    detail += "; it shares nothing with the reward model, and only forbids"
    return _check(name, "fail" if harmful else "pass", found, detail, proves_benefit=False)


def length_controlled(
    units: Sequence[str],
    outcomes: Sequence[float],
    lengths: Sequence[tuple[float, float]],
    profile: Profile,
    statistics: StatisticsSettings,
) -> Check:
    """Return whether the win survives where both answers are equally long.

    Asked only of a candidate whose answers are longer: brevity is cheap to judge, padding is not.
    """
    name = "win rate at equal length"
    if (short := _too_small(name, units, profile, statistics)) is not None:
        return short
    ours, theirs = (math.fsum(values) for values in zip(*lengths, strict=True))
    ratio = ours / max(1.0, theirs)
    value, low, high = at_equal_length(outcomes, lengths)
    longer = ratio > _LONGER_FROM
    verdict: Verdict = "pass"
    if longer and low <= 0.5:
        verdict = "fail" if high < 0.5 else "inconclusive"
    asked = "its answers are longer" if longer else "shown only: its answers are not longer"
    return Check(
        name,
        verdict,
        value=value,
        limit=0.5,
        n=len(outcomes),
        interval=(low, high),
        detail=f"outcome regressed on the difference in length, {ratio:.2f} times; {asked}",
        proves_benefit=longer,
    )


def _too_small(
    name: str, units: Sequence[str], profile: Profile, statistics: StatisticsSettings
) -> Check | None:
    n_units = len(set(units))
    personal = profile == "personal"
    least = statistics.min_units if personal else statistics.min_units_raters
    if n_units >= least:
        return None
    unit = "prompts" if personal else "raters"
    detail = f"n too small: {n_units} {unit}, {least} are needed"
    return Check(
        name, "skipped", n=len(units), limit=float(least), detail=detail, proves_benefit=True
    )


def _paired(
    units: Sequence[str], outcomes: Sequence[float], statistics: StatisticsSettings
) -> Paired:
    return paired(units, outcomes, confidence=statistics.confidence, resamples=statistics.resamples)


def _benefit_check(name: str, found: Paired, statistics: StatisticsSettings, detail: str) -> Check:
    verdict: Verdict = "inconclusive"
    if found.p_better <= statistics.level:
        verdict = "pass"
    elif found.p_worse <= statistics.level:
        verdict = "fail"
    return _check(name, verdict, found, detail, proves_benefit=True)


def _non_inferior_check(
    name: str,
    units: Sequence[str],
    outcomes: Sequence[float],
    found: Paired,
    statistics: StatisticsSettings,
    detail: str,
) -> Check:
    margin = statistics.non_inferiority_margin
    p_value = non_inferior(units, outcomes, margin=margin, resamples=statistics.resamples)
    verdict: Verdict = "inconclusive"
    if p_value <= statistics.level:
        verdict = "pass"
    elif found.p_worse <= statistics.level and found.value < 0.5 - margin:
        verdict = "fail"
    detail += f"; not worse by {margin:.0%}: p = {p_value:.3g}"
    return _check(name, verdict, found, detail, proves_benefit=True, limit=0.5 - margin)


def _check(
    name: str,
    verdict: Verdict,
    found: Paired,
    detail: str,
    *,
    proves_benefit: bool,
    limit: float = 0.5,
) -> Check:
    return Check(
        name,
        verdict,
        value=found.value,
        limit=limit,
        n=found.n_units,
        interval=(found.low, found.high),
        detail=detail,
        proves_benefit=proves_benefit,
    )

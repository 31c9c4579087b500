"""Offline checks of drift: how far sampled answers moved from the base's and the champion's.

Owns each measure's definition and comparison; limits come from `DriftSettings`. A limit is a
tolerance on the average found, shown with its interval, and lies about three standard errors from
"no change" at 48 prompts; these checks protect, they prove no benefit. Pure
functions of sampled answers, any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from heedful_trainer.gate import text_measures
from heedful_trainer.gate.sampler import Answer
from heedful_trainer.gate.settings import DriftSettings, ProbeSettings, StatisticsSettings
from heedful_trainer.gate.statistics import bootstrap_mean
from heedful_trainer.gate.types import Check


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers of both policies to the same prompts, and their log-probs under the others.

    Each entry of the last four fields holds one number a token.
    """

    candidate: tuple[Answer, ...]
    champion: tuple[Answer, ...]
    candidate_by_base: tuple[tuple[float, ...], ...]
    candidate_by_champion: tuple[tuple[float, ...], ...]
    champion_by_base: tuple[tuple[float, ...], ...]
    champion_by_candidate: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class _Measured:
    """One number an answer, for both policies, compared as a mean difference."""

    name: str
    candidate: Sequence[float]
    champion: Sequence[float]
    limit: float
    upwards: bool  # True: a rise is what is limited
    unit: str
    overridable: bool = True


def drift_checks(
    sampled: Sampled,
    drift: DriftSettings,
    probes: ProbeSettings,
    statistics: StatisticsSettings,
) -> list[Check]:
    """Return every check of drift, or one that says that there are too few answers."""
    if len(sampled.candidate) < drift.min_answers:
        n = len(sampled.candidate)
        return [Check("drift", "skipped", n=n, limit=drift.min_answers, detail="n too small")]
    shares = [
        _share("looping", text_measures.is_looping, sampled, drift.max_looping_rise),
        _share("refusals", text_measures.is_refusal, sampled, drift.max_refusal_rise),
        _share("degenerate answers", _degenerate, sampled, drift.max_degenerate_rise),
        _share("praise", text_measures.is_praise, sampled, probes.max_praise_rise, safety=True),
        _mean("broken text", text_measures.broken_share, sampled, drift.max_broken_text_rise),
        _distinct(sampled, drift),
        _ended(sampled, drift),
    ]
    return [
        _kl("KL to base", sampled, sampled.candidate_by_base, drift.max_kl_base_nats, statistics),
        _kl(
            "KL to champion",
            sampled,
            sampled.candidate_by_champion,
            drift.max_kl_champion_nats,
            statistics,
        ),
        _length(sampled, drift, statistics),
        _end_logprob(sampled, drift, statistics),
        _fluency(sampled, drift, statistics),
        _format(sampled, drift),
        *(_compare(measured, statistics) for measured in shares),
    ]


def _kl(
    name: str,
    sampled: Sampled,
    other: Sequence[Sequence[float]],
    limit: float,
    statistics: StatisticsSettings,
) -> Check:
    values = np.array(
        [
            math.fsum(answer.logprobs) - math.fsum(scored)
            for answer, scored in zip(sampled.candidate, other, strict=True)
        ]
    )
    value = float(values.mean())
    return Check(
        name,
        "pass" if value <= limit else "fail",  # not a number fails
        value=value,
        limit=limit,
        n=len(values),
        interval=bootstrap_mean(values, statistics.confidence, statistics.resamples),
        detail="nats an answer, summed over its tokens, from answers sampled at T = 1",
    )


def _length(sampled: Sampled, drift: DriftSettings, statistics: StatisticsSettings) -> Check:
    ours = np.array([answer.num_tokens for answer in sampled.candidate], dtype=float)
    theirs = np.array([answer.num_tokens for answer in sampled.champion], dtype=float)
    mean = max(1e-9, float(theirs.mean()))
    value = float(ours.mean()) / mean
    low, high = bootstrap_mean(ours - theirs, statistics.confidence, statistics.resamples)
    longer = value > 1
    within = drift.min_length_ratio <= value <= drift.max_length_ratio
    return Check(
        "length",
        "pass" if within else "fail",
        value=value,
        limit=drift.max_length_ratio if longer else drift.min_length_ratio,
        n=len(ours),
        interval=(1 + low / mean, 1 + high / mean),
        detail=f"tokens an answer: {ours.mean():.0f}, the champion's {theirs.mean():.0f}",
    )


def _end_logprob(sampled: Sampled, drift: DriftSettings, statistics: StatisticsSettings) -> Check:
    """Compare what both policies give the end token where the champion's answers ended.

    Long before fewer answers end, and with far less noise, this shows a policy that learns never
    to stop.
    """
    drops = [
        answer.logprobs[-1] - scored[-1]
        for answer, scored in zip(sampled.champion, sampled.champion_by_candidate, strict=True)
        if answer.ended and scored
    ]
    limit = drift.max_end_logprob_drop
    if len(drops) < drift.min_answers // 2:
        detail = "n too small: too few of the champion's answers ended within the budget"
        return Check("end token", "skipped", n=len(drops), limit=limit, detail=detail)
    values = np.array(drops)
    value = float(values.mean())
    return Check(
        "end token",
        "pass" if value <= limit else "fail",
        value=value,
        limit=limit,
        n=len(drops),
        interval=bootstrap_mean(values, statistics.confidence, statistics.resamples),
        detail="nats that the end token lost where the champion's answers ended",
        overridable=False,
    )


def _fluency(sampled: Sampled, drift: DriftSettings, statistics: StatisticsSettings) -> Check:
    ours = _losses(sampled.candidate_by_base)
    theirs = _losses(sampled.champion_by_base)
    measured = _Measured(
        "fluency", ours, theirs, drift.max_base_loss_rise, upwards=True, unit="nats a token"
    )
    return _compare(measured, statistics)


def _losses(scores: Sequence[Sequence[float]]) -> list[float]:
    return [-math.fsum(scored) / max(1, len(scored)) for scored in scores]


def _format(sampled: Sampled, drift: DriftSettings) -> Check:
    ours = [text_measures.formats(answer.text) for answer in sampled.candidate]
    theirs = [text_measures.formats(answer.text) for answer in sampled.champion]
    shifts = {
        name: sum(name in found for found in ours) / len(ours)
        - sum(name in found for found in theirs) / len(theirs)
        for name in text_measures.format_names()
    }
    name = max(shifts, key=lambda key: abs(shifts[key]))
    value = abs(shifts[name])
    return Check(
        "format",
        "pass" if value <= drift.max_format_shift else "fail",
        value=value,
        limit=drift.max_format_shift,
        n=len(ours),
        detail=f"largest change: {name}, {shifts[name]:+.0%} of answers",
    )


def _share(
    name: str,
    measure: Callable[[str], bool],
    sampled: Sampled,
    limit: float,
    *,
    safety: bool = False,
) -> _Measured:
    return _Measured(
        name,
        [float(measure(answer.text)) for answer in sampled.candidate],
        [float(measure(answer.text)) for answer in sampled.champion],
        limit,
        upwards=True,
        unit="of answers",
        overridable=not safety,
    )


def _mean(name: str, measure: Callable[[str], float], sampled: Sampled, limit: float) -> _Measured:
    return _Measured(
        name,
        [measure(answer.text) for answer in sampled.candidate],
        [measure(answer.text) for answer in sampled.champion],
        limit,
        upwards=True,
        unit="of characters",
    )


def _degenerate(text: str) -> bool:
    return text_measures.is_degenerate(text)


def _distinct(sampled: Sampled, drift: DriftSettings) -> _Measured:
    return _Measured(
        "distinct trigrams",
        [text_measures.distinct_share(answer.token_ids) for answer in sampled.candidate],
        [text_measures.distinct_share(answer.token_ids) for answer in sampled.champion],
        drift.max_distinct_drop,
        upwards=False,
        unit="of token trigrams",
    )


def _ended(sampled: Sampled, drift: DriftSettings) -> _Measured:
    return _Measured(
        "endings",
        [float(answer.ended) for answer in sampled.candidate],
        [float(answer.ended) for answer in sampled.champion],
        drift.max_ended_drop,
        upwards=False,
        unit="of answers end within the budget",
        overridable=False,
    )


def _compare(measured: _Measured, statistics: StatisticsSettings) -> Check:
    """Return the check of a mean difference, counted in the direction that is limited."""
    sign = 1.0 if measured.upwards else -1.0
    ours, theirs = np.array(measured.candidate), np.array(measured.champion)
    differences = sign * (ours - theirs)
    value = float(differences.mean())
    return Check(
        measured.name,
        "pass" if value <= measured.limit else "fail",
        value=value,
        limit=measured.limit,
        n=len(differences),
        interval=bootstrap_mean(differences, statistics.confidence, statistics.resamples),
        detail=(
            f"{'rise' if measured.upwards else 'drop'} against the champion, "
            f"{ours.mean():.3g} after {theirs.mean():.3g} {measured.unit}"
        ),
        overridable=measured.overridable,
    )

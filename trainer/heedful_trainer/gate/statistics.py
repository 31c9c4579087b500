"""Tests and intervals of the gate: pure functions of numbers.

Owns the null hypotheses. Observations of one unit (a prompt, or a rater) are not independent, so
every test works on one number a unit. Equal candidates make those numbers symmetric about zero,
whatever a rater's taste, ties and position bias, so flipping their signs is an exact test; no
normal approximation is needed at the small n of a personal project. Any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Alternative = Literal["greater", "less"]
_MAX_EXACT_UNITS = 12
_INTERCEPT_PENALTY = 0.1  # a third of a vote towards a half: keeps a clean sweep finite
_SLOPE_PENALTY = 0.01
_NEWTON_STEPS = 40
_SEED = 12_345  # of resampling: the same numbers always give the same verdict


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share with its two-sided interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """Paired comparisons, ties as a half, one value a unit."""

    value: float  # mean over units, 0..1
    low: float
    high: float
    n_units: int
    n: int  # comparisons
    p_better: float  # of "no better than a half", one-sided
    p_worse: float  # of "no worse than a half", one-sided


def wilson(successes: int, n: int, confidence: float = 0.95) -> Proportion:
    """Return a share and its Wilson interval.

    Raises:
        ValueError: n is not positive, or successes is outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no share")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Proportion(successes / n, float(interval.low), float(interval.high), n)


def sign_test(wins: int, losses: int, alternative: Alternative = "greater") -> float:
    """Return the exact p-value of "wins and losses are equally likely"; ties are left out."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5, alternative=alternative).pvalue)


def unit_means(units: Sequence[str], values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the mean of each unit's values, in the order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for unit, value in zip(units, values, strict=True):
        grouped.setdefault(unit, []).append(value)
    return np.array([math.fsum(group) / len(group) for group in grouped.values()])


def sign_flip(values: npt.NDArray[np.float64], resamples: int) -> float:
    """Return the one-sided p-value of "symmetric about zero" against "mean above zero".

    Exact to twelve values that are not zero, by random flips (with the observed one counted)
    beyond.
    """
    values = values[values != 0.0]
    if not len(values):
        return 1.0
    observed = float(values.sum()) - 1e-9  # sums of the same numbers differ by rounding
    if len(values) <= _MAX_EXACT_UNITS:
        bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean((1 - 2 * bits) @ values >= observed))
    signs = 1 - 2 * np.random.default_rng(_SEED).integers(0, 2, (resamples, len(values)))
    return float((1 + np.sum(signs @ values >= observed)) / (1 + resamples))


def bootstrap_mean(
    values: npt.NDArray[np.float64], confidence: float, resamples: int
) -> tuple[float, float]:
    """Return the percentile interval of a mean, units drawn with replacement."""
    if len(values) < 2:
        return -math.inf, math.inf
    rng = np.random.default_rng(_SEED)
    draws = rng.integers(0, len(values), (resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def paired(
    units: Sequence[str], outcomes: Sequence[float], *, confidence: float, resamples: int
) -> Paired:
    """Return what paired outcomes say, where 1 is a win, 0 a loss and a half a tie.

    Raises:
        ValueError: there is none, or one is outside 0..1.
    """
    if not outcomes or not all(0 <= outcome <= 1 for outcome in outcomes):
        raise ValueError("outcomes are numbers from 0 to 1, at least one")
    means = unit_means(units, outcomes)
    centred = means - 0.5
    low, high = bootstrap_mean(means, confidence, resamples)
    return Paired(
        value=float(means.mean()),
        low=max(0.0, low),
        high=min(1.0, high),
        n_units=len(means),
        n=len(outcomes),
        p_better=sign_flip(centred, resamples),
        p_worse=sign_flip(-centred, resamples),
    )


def non_inferior(
    units: Sequence[str], outcomes: Sequence[float], *, margin: float, resamples: int
) -> float:
    """Return the p-value of "loses by the margin or more" against "loses by less"."""
    return sign_flip(unit_means(units, outcomes) - 0.5 + margin, resamples)


def outcome_of(difference: float, tie_width: float) -> float:
    """Return 1, 0 or a half for a difference of scores; within the width it is a tie."""
    if abs(difference) <= tie_width:
        return 0.5
    return 1.0 if difference > 0 else 0.0


def at_equal_length(
    outcomes: Sequence[float], lengths: Iterable[tuple[float, float]]
) -> tuple[float, float, float]:
    """Return the win rate at equal length with its two-sided 90 % interval.

    A logistic regression of the outcome on the difference in length, whose intercept is the answer.
    The slope is held back a little, so that it stays finite where length decides everything.

    Args:
        outcomes: 1, 0 or a half of each comparison.
        lengths: tokens of the candidate's and of the champion's answer.
    """
    shifts = np.array([(ours - theirs) / max(1.0, ours + theirs) for ours, theirs in lengths])
    design = np.column_stack([np.ones(len(shifts)), shifts / (shifts.std() or 1.0)])
    target = np.asarray(outcomes, dtype=float)
    penalty = np.diag([_INTERCEPT_PENALTY, _SLOPE_PENALTY])
    weights = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        share = special.expit(design @ weights)
        curvature = design.T @ (design * (share * (1 - share))[:, None]) + penalty
        step = np.linalg.solve(curvature, design.T @ (target - share) - penalty @ weights)
        weights += np.clip(step, -1.0, 1.0)  # a full step overshoots where the classes are apart
    half = 1.645 * math.sqrt(np.linalg.inv(curvature)[0, 0])
    low, value, high = special.expit([weights[0] - half, weights[0], weights[0] + half])
    return float(value), float(low), float(high)

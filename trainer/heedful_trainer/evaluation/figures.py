"""A figure of an evaluation: both policies' estimates, their difference, n and 95 % intervals.

Owns which interval belongs to which kind of number and how a figure is read in a word. Items of
both policies are the same, so differences are paired. The tests themselves are the gate's. Pure,
any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from heedful_trainer.gate.statistics import Paired, bootstrap_mean, paired, wilson

CONFIDENCE = 0.95
MIN_UNITS = 12
"""Fewer observations than this are shown, and nothing is concluded from them."""
_RESAMPLES = 4000

Better: TypeAlias = Literal["higher", "lower", "neither"]
Reading: TypeAlias = Literal[
    "better", "worse", "higher", "lower", "no difference shown", "n too small", "not compared"
]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its two-sided 95 % interval, which may be infinite, and n behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an end that is not known is null."""
        ends = {"low": self.low, "high": self.high}
        known = {name: end if math.isfinite(end) else None for name, end in ends.items()}
        return {"value": self.value, **known, "n": self.n}


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report.

    A figure that compares by itself, such as a win rate, has a `reference` instead of a baseline:
    the value that means "no difference".
    """

    name: str
    unit: str  # "share", else what people read: "nats a token"
    better: Better
    version: Estimate | None
    baseline: Estimate | None = None
    difference: Estimate | None = None
    reference: float | None = None
    detail: str = ""

    @property
    def compared(self) -> tuple[Estimate, float] | None:
        """The estimate that compares the policies and its value for equal ones."""
        if self.difference is not None:
            return self.difference, 0.0
        if self.version is not None and self.reference is not None:
            return self.version, self.reference
        return None

    @property
    def reading(self) -> Reading:
        """What the interval says in a word."""
        if self.compared is None:
            return "not compared"
        found, equal = self.compared
        if found.n < MIN_UNITS:
            return "n too small"
        if found.low <= equal <= found.high:
            return "no difference shown"
        rose = found.low > equal
        if self.better == "neither":
            return "higher" if rose else "lower"
        return "better" if rose == (self.better == "higher") else "worse"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        estimates = {
            "version": self.version,
            "baseline": self.baseline,
            "difference": self.difference,
        }
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            **{key: item.to_json() if item else None for key, item in estimates.items()},
            "reference": self.reference,
            "reading": self.reading,
            "detail": self.detail,
        }


def share(hits: Iterable[bool]) -> Estimate | None:
    """Return a share with its Wilson interval; None of nothing."""
    found = [bool(hit) for hit in hits]
    if not found:
        return None
    interval = wilson(sum(found), len(found), CONFIDENCE)
    return Estimate(interval.value, interval.low, interval.high, len(found))


def mean(values: Sequence[float]) -> Estimate | None:
    """Return a mean with its bootstrap interval; None of nothing."""
    if not values:
        return None
    low, high = bootstrap_mean(np.asarray(values, dtype=float), CONFIDENCE, _RESAMPLES)
    return Estimate(math.fsum(values) / len(values), low, high, len(values))


def share_difference(version: Sequence[bool], baseline: Sequence[bool]) -> Estimate | None:
    """Return the difference of two shares over the same items, None of nothing.

    The interval squares and adds the distances of both Wilson intervals, less their correlation
    (Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10). Unlike a bootstrap it stays
    wide where ten items agree by chance.
    """
    ours, theirs = share(version), share(baseline)
    if ours is None or theirs is None:
        return None
    phi = _correlation(version, baseline)
    up, down = ours.high - ours.value, ours.value - ours.low
    other_up, other_down = theirs.high - theirs.value, theirs.value - theirs.low
    difference = ours.value - theirs.value
    below = math.sqrt(max(0.0, down**2 - 2 * phi * down * other_up + other_up**2))
    above = math.sqrt(max(0.0, up**2 - 2 * phi * up * other_down + other_down**2))
    return Estimate(difference, difference - below, difference + above, ours.n)


def mean_difference(version: Sequence[float], baseline: Sequence[float]) -> Estimate | None:
    """Return the mean of paired differences, None of nothing."""
    return mean([ours - theirs for ours, theirs in zip(version, baseline, strict=True)])


def win_rate(units: Sequence[str], outcomes: Sequence[float]) -> tuple[Estimate, Paired]:
    """Return the share of wins, ties as a half, and the tests behind it.

    Args:
        units: what counts as one observation, for each outcome.
        outcomes: 1 for the version, 0 for the baseline, a half for neither; at least one.
    """
    found = paired(units, outcomes, confidence=CONFIDENCE, resamples=_RESAMPLES)
    low, high = found.low, found.high
    if low == high:  # all alike: resampling cannot tell how much that means
        interval = wilson(round(found.value * found.n_units), found.n_units, CONFIDENCE)
        low, high = min(interval.low, found.value), max(interval.high, found.value)
    return Estimate(found.value, low, high, found.n_units), found


def share_figure(
    name: str,
    both: tuple[Sequence[bool], Sequence[bool]],
    compares: bool,
    better: Better = "higher",
    detail: str = "",
) -> Figure:
    """Return the figure of a yes or no for each item, of the version and of the baseline.

    Where version and baseline are the same policy nothing is compared.
    """
    version, baseline = both
    return Figure(
        name,
        "share",
        better,
        share(version),
        share(baseline) if compares else None,
        share_difference(version, baseline) if compares else None,
        detail=detail,
    )


def mean_figure(
    name: str,
    unit: str,
    both: tuple[Sequence[float], Sequence[float]],
    compares: bool,
    better: Better = "higher",
    detail: str = "",
) -> Figure:
    """Return the figure of a number for each item; as `share_figure` otherwise."""
    version, baseline = both
    return Figure(
        name,
        unit,
        better,
        mean(version),
        mean(baseline) if compares else None,
        mean_difference(version, baseline) if compares else None,
        detail=detail,
    )


def _correlation(version: Sequence[bool], baseline: Sequence[bool]) -> float:
    """Return phi of the fourfold table, corrected for continuity where it is positive."""
    cells = list(zip(version, baseline, strict=True))
    both, neither = cells.count((True, True)), cells.count((False, False))
    ours, theirs = cells.count((True, False)), cells.count((False, True))
    margins = (both + ours) * (theirs + neither) * (both + theirs) * (ours + neither)
    if not margins:
        return 0.0
    product = float(both * neither - ours * theirs)
    if product > 0:
        product = max(0.0, product - len(cells) / 2)
    return product / math.sqrt(margins)

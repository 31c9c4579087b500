"""Whether a new champion does harm that shows at once: failing or slow, beside the one before it.

Owns the decision and its evidence, as one pure function. It says nothing of whether answers are
good; that was the gate's question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from heedful_server.deployment.observing import Figures

_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class ProbationLimits:
    """What a new champion may do worse."""

    min_generations: int  # before anything is said
    max_error_increase: float  # share of generations, added to the old champion's
    max_slowdown: float  # time per output token as a multiple of the old champion's


def harm(old: Figures, new: Figures, limits: ProbationLimits) -> str:
    """Return what is worse beyond the limits, for people; empty while nothing is."""
    return _errors(old, new, limits) or _slowness(old, new, limits)


def wilson(share: float, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of `total`; all of 0..1 where there is none."""
    if total <= 0:
        return 0.0, 1.0
    z2 = _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = share * (1 - share) / total + z2 / (4 * total**2)
    half = _Z95 * math.sqrt(spread) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def _errors(old: Figures, new: Figures, limits: ProbationLimits) -> str:
    if new.generations < limits.min_generations:
        return ""
    share = new.errors / new.generations
    before = old.errors / old.generations if old.generations else 0.0
    # The lower end of the interval: a handful of failures by chance is no evidence.
    low, _ = wilson(share, new.generations)
    if low <= before + limits.max_error_increase:
        return ""
    return (
        f"{new.errors} of {new.generations} generations failed ({share:.0%}); "
        f"before, {old.errors} of {old.generations} did"
    )


def _slowness(old: Figures, new: Figures, limits: ProbationLimits) -> str:
    if min(old.timed, new.timed) < limits.min_generations:
        return ""
    if not old.seconds_per_token or new.seconds_per_token is None:
        return ""
    times = new.seconds_per_token / old.seconds_per_token
    if times <= limits.max_slowdown:
        return ""
    return (
        f"an output token takes {new.seconds_per_token * 1000:.1f} ms in the median, {times:.1f} "
        f"times the {old.seconds_per_token * 1000:.1f} ms before"
    )

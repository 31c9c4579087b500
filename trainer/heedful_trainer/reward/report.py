"""What a reward model is worth, on judgements that it never saw.

Owns the figures and that each stands beside what it has to beat: accuracy beside "the longer one",
calibration before and after the temperature, the ensemble beside its heads' agreement. Pure apart
from scoring. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from heedful_trainer import calibration as c
from heedful_trainer.dataset.builders import Group
from heedful_trainer.packing import Row
from heedful_trainer.reward.model import RewardModel
from heedful_trainer.reward.pairs import RewardPair, pairs_of_groups, score_groups

_LENGTH_BUCKETS = ((0, 32), (32, 128), (128, 1 << 30))  # tokens of the longer answer


def report_on_reward(
    model: RewardModel, *, unbiased: Sequence[Group], unseen: Sequence[Group]
) -> dict[str, Any]:
    """Return the report as plain JSON values; a figure without data is None.

    Args:
        model: the trained model.
        unbiased: what neither training nor its end looked at; the temperature may have, since it
            changes no order.
        unseen: the part of it that the temperature was not fitted on either.
    """
    scored = score_groups(model, [*unbiased, *unseen])
    pairs = pairs_of_groups(unbiased, scored)
    decided = [pair for pair in pairs if pair.outcome != 0.5]
    without_corrections = [pair for pair in decided if pair.source != "correction"]
    sources = sorted({pair.source for pair in decided})
    return {
        "accuracy": _accuracy(decided),
        "accuracy_without_corrections": _accuracy(without_corrections),
        "by_source": {s: _accuracy([p for p in decided if p.source == s]) for s in sources},
        "by_length": {
            f"{low}-{high - 1}" if high < 1 << 30 else f"{low}+": _accuracy(
                [p for p in decided if low <= max(p.lengths) < high]
            )
            for low, high in _LENGTH_BUCKETS
        },
        "length_only_accuracy": _length_only(decided),
        "length_correlation": _length_correlation(unbiased, scored),
        "calibration": _calibration(pairs_of_groups(unseen, scored), model.heads.temperature),
        "temperature": model.heads.temperature,
        "head_error_correlation": _head_errors(decided, model.heads.temperature),
        "ties": len(pairs) - len(decided),
    }


def _accuracy(pairs: Sequence[RewardPair]) -> dict[str, Any]:
    right = sum(
        0.5 if p.difference == 0 else float((p.difference > 0) == (p.outcome > 0.5)) for p in pairs
    )
    n = len(pairs)
    interval = list(c.wilson_interval(right, n))
    return {"n": n, "value": right / n if n else None, "interval": interval}


def _length_only(pairs: Sequence[RewardPair]) -> float | None:
    """Return the accuracy of the better of "longer" and "shorter"."""
    if not pairs:
        return None
    longer = 0.0
    for pair in pairs:
        first, second = pair.lengths
        longer += 0.5 if first == second else float((first > second) == (pair.outcome > 0.5))
    return max(longer, len(pairs) - longer) / len(pairs)


def _length_correlation(
    groups: Sequence[Group], scored: Mapping[Row, Sequence[Sequence[float]]]
) -> float | None:
    """Return the mean rank correlation between reward and length within a prompt."""
    found = []
    for group in groups:
        answers = group.row.answers
        if len(set(map(len, answers))) > 1:
            rewards = [fmean(heads) for heads in scored[group.row]]
            found.append(c.spearman(rewards, [float(len(answer)) for answer in answers]))
    return sum(found) / len(found) if found else None


def _calibration(pairs: Sequence[RewardPair], temperature: float) -> dict[str, Any]:
    usable = [pair for pair in pairs if pair.source != "correction"]
    if not usable:
        return {"n": 0}
    outcomes = [pair.outcome for pair in usable]
    found: dict[str, Any] = {"n": len(usable)}
    for name, scale in (("before", 1.0), ("after", temperature)):
        p = c.probabilities([pair.difference for pair in usable], scale)
        found[f"ece_{name}"] = c.expected_calibration_error(p, outcomes)
        found[f"debiased_ece_{name}"] = c.debiased_calibration_error(p, outcomes)
    return found


def _head_errors(pairs: Sequence[RewardPair], temperature: float) -> float | None:
    if not pairs:
        return None
    heads = zip(*(pair.differences for pair in pairs), strict=True)
    outcomes = [pair.outcome for pair in pairs]
    errors = [
        [y - p for y, p in zip(outcomes, c.probabilities(list(head), temperature), strict=True)]
        for head in heads
    ]
    return c.mean_error_correlation(errors)

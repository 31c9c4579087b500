"""Held-out pairs under a reward model, with what the report wants to know about each.

Owns which judgements make a pair: rankings, corrections, and opposite thumbs on one prompt. One
thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heedful_trainer.dataset.builders import Group, Order
from heedful_trainer.packing import Row
from heedful_trainer.reward.model import RewardModel


@dataclass(frozen=True, slots=True)
class RewardPair:
    """One pair; the outcome is 1 where the first answer was preferred, ½ for a tie."""

    differences: tuple[float, ...]  # r(first) - r(second), per head
    outcome: float
    source: str  # "comparison", "import:…", "rating", "thumb", "correction"
    lengths: tuple[int, int]  # tokens

    @property
    def difference(self) -> float:
        """Of the mean reward."""
        return sum(self.differences) / len(self.differences)


def score_groups(model: RewardModel, groups: Sequence[Group]) -> dict[Row, list[list[float]]]:
    """Return the rewards of every answer, [answer][head] by row, each row computed once."""
    rows = dict.fromkeys(group.row for group in groups)
    return {row: model.score([row]).tolist() for row in rows}


def pairs_of_groups(
    groups: Sequence[Group], scored: Mapping[Row, Sequence[Sequence[float]]]
) -> list[RewardPair]:
    """Return every pair that a part of the dataset holds, with what `score_groups` found."""
    found: list[RewardPair] = []
    for group in groups:
        wanted = _wanted(group)
        if not wanted:
            continue
        rewards = scored[group.row]
        answers = group.row.answers
        for first, second, outcome, source in wanted:
            differences = tuple(a - b for a, b in zip(rewards[first], rewards[second], strict=True))
            lengths = (len(answers[first]), len(answers[second]))
            found.append(RewardPair(differences, outcome, source, lengths))
    return found


def pairs_of_order(order: Order) -> list[tuple[int, int, float]]:
    """Return the pairs of one ranking: first and second answer, and the outcome, ½ for a tie."""
    ranked = zip(order.answers, order.ranks, strict=True)
    return [
        (a, b, 0.5 if rank_a == rank_b else float(rank_a < rank_b))
        for (a, rank_a), (b, rank_b) in itertools.combinations(ranked, 2)
    ]


def pair_differences(
    model: RewardModel, groups: Sequence[Group]
) -> tuple[list[float], list[float]]:
    """Return Δr and outcome of the pairs that calibration uses: no corrections."""
    pairs = pairs_of_groups(groups, score_groups(model, groups))
    pairs = [pair for pair in pairs if pair.source != "correction"]
    return [pair.difference for pair in pairs], [pair.outcome for pair in pairs]


def _wanted(group: Group) -> list[tuple[int, int, float, str]]:
    found: list[tuple[int, int, float, str]] = []
    for order in group.orders:
        found += [(*pair, order.source) for pair in pairs_of_order(order)]
    ups = [answer for answer, up in group.thumbs if up]
    downs = [answer for answer, up in group.thumbs if not up]
    found += [(up, down, 1.0, "thumb") for up in ups for down in downs if up != down]
    found += [(item.corrected, item.served, 1.0, "correction") for item in group.corrections]
    return found

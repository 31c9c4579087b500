"""A simulated rater: a taste, and how unreliably a person with that taste would vote.

Owns the model of a vote: scores of the taste, a preference for what is shown first, Gumbel noise
(so that the better of two wins with the probability of Bradley and Terry), some votes at random,
and a tie where the scores differ by little. Pure apart from its own random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from heedful_trainer.simulation.tastes import Taste, score

TAG = "simulated"


@dataclass(frozen=True, slots=True)
class Reliability:
    """How a simulated rater errs."""

    noise: float = 0.05  # scale of the noise on a score
    random_share: float = 0.1  # of votes that ignore the answers
    tie_width: float = 0.02  # scores this close are a tie
    coin_tie_share: float = 0.1  # of a coin-flipper's votes that are ties
    first_bias: float = 0.0  # added to the score of what is shown first


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer as a rater sees it."""

    text: str
    ended: bool


class SimulatedRater:
    """One rater; the same seed and answers give the same votes."""

    def __init__(
        self, taste: Taste, number: int = 0, seed: int = 0, reliability: Reliability | None = None
    ) -> None:
        self.taste = taste
        self.rater_id = f"simulated:{taste}" + (f":{number}" if number else "")
        self._reliability = reliability or Reliability()
        self._random = random.Random(f"{seed}:{self.rater_id}")

    def rank(self, shown: Sequence[ShownAnswer]) -> tuple[tuple[int, ...], ...]:
        """Return positions in `shown`, best group first; those in one group are tied."""
        erring = self._reliability
        if self.taste == "coin" or self._random.random() < erring.random_share:
            return self._at_random(len(shown))
        scores = [score(self.taste, answer.text, answer.ended) for answer in shown]
        scores[0] += erring.first_bias
        felt = [value + erring.noise * self._gumbel() for value in scores]
        order = sorted(range(len(shown)), key=lambda idx: -felt[idx])
        groups = [[order[0]]]
        for idx in order[1:]:
            if abs(scores[groups[-1][0]] - scores[idx]) <= erring.tie_width:
                groups[-1].append(idx)
            else:
                groups.append([idx])
        return tuple(tuple(group) for group in groups)

    def _at_random(self, count: int) -> tuple[tuple[int, ...], ...]:
        order = list(range(count))
        self._random.shuffle(order)
        if self._random.random() < self._reliability.coin_tie_share:
            return (tuple(order),)
        return tuple((idx,) for idx in order)

    def _gumbel(self) -> float:
        return -math.log(-math.log(self._random.random() or 1e-300))

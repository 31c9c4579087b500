"""What a rollout is, and what is asked for when some are drawn.

Owns the records. A rollout is kept as it was sampled: token ids and the log-probs of what sampled
them, never text. It knows neither files nor servers. Pure, any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from heedful_trainer.packing import Row

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer, at T = 1 without truncation."""

    prompt: Ids
    answer: Ids  # ends in the end token where it ended of itself
    logprobs: tuple[float, ...]  # log μ of each token of the answer, in nats
    ended: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rollouts one iteration needs. Its name is their place on disk."""

    name: str
    policy: str  # name of the adapter that answers; "" is the base
    prompts: tuple[Ids, ...]
    samples: int  # of each prompt
    max_tokens: int
    seed: int

    def parts(self, size: int) -> Iterator[tuple[int, tuple[Ids, ...]]]:
        """Yield the place of the first prompt of each part, and its prompts."""
        for start in range(0, len(self.prompts), size):
            yield start, self.prompts[start : start + size]

    def seed_of(self, position: int) -> int:
        """Return the seed of one prompt's samples; its place decides, not when it is drawn."""
        digest = hashlib.sha256(f"{self.seed}|{self.name}|{position}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def rows_of(rollouts: Sequence[Rollout]) -> list[tuple[Row, tuple[Rollout, ...]]]:
    """Return rollouts that follow each other with one prompt as rows: the prompt computed once."""
    groups: list[list[Rollout]] = []
    for rollout in rollouts:
        if groups and groups[-1][0].prompt == rollout.prompt:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return [
        (Row(group[0].prompt, tuple(item.answer for item in group)), tuple(group))
        for group in groups
    ]

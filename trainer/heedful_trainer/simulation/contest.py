"""Two policies on prompts that nobody voted on, judged by the true taste.

Owns how answers are drawn and compared: same prompts, same sampling, no truncation, ties as a half,
the prompt as the unit. Also what the change cost: divergence from the base and how fluent answers
are to it; and what choosing among four answers of the base would give, the ceiling to compare with.
Event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import heedful
import numpy as np

from heedful_trainer.gate.sampler import Answer, Draw, Sampler
from heedful_trainer.gate.statistics import Paired, bootstrap_mean, outcome_of, paired
from heedful_trainer.simulation.tastes import Taste, score

TIE_WIDTH = 0.02
CONFIDENCE = 0.95
RESAMPLES = 4000
BEST_OF = 4


@dataclass(frozen=True, slots=True)
class Contest:
    """What a contest found; intervals at 95 %, the prompt as the unit."""

    taste: Taste
    model: str
    against: str
    prompts: int
    win_rate: float
    win_rate_interval: tuple[float, float]
    wins: int
    losses: int
    ties: int
    kl_nats: float  # to `against`, summed over tokens, T = 1
    kl_interval: tuple[float, float]
    perplexity: float  # of the model's answers under `against`
    perplexity_against: float  # of its own answers
    tokens: float  # mean length
    tokens_against: float
    ended: float  # share within the budget
    ended_against: float
    mean_score: float
    mean_score_against: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


async def hold_contest(
    sampler: Sampler,
    taste: Taste,
    model: str,
    against: str,
    prompts: Sequence[str],
    draw: Draw,
) -> Contest:
    """Return how a model fares against another by a taste.

    Raises:
        HeedfulError: the server does not answer.
    """
    asked: list[heedful.Prompt] = [*prompts]
    other = Draw(draw.temperature, draw.max_tokens, draw.seed + len(prompts))
    ours, theirs = await asyncio.gather(
        sampler.answer(model, asked, draw), sampler.answer(against, asked, other)
    )
    items = [(prompt, answer.token_ids) for prompt, answer in zip(asked, ours, strict=True)]
    scored = await sampler.score(against, items)
    return summarize(taste, model, against, ours, theirs, scored)


def summarize(
    taste: Taste,
    model: str,
    against: str,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    ours_by_other: Sequence[Sequence[float]],
) -> Contest:
    """Return what two sets of answers to the same prompts say."""
    our_scores = [score(taste, answer.text, answer.ended) for answer in ours]
    their_scores = [score(taste, answer.text, answer.ended) for answer in theirs]
    outcomes, found = _outcomes(our_scores, their_scores)
    kl = np.array(
        [
            math.fsum(answer.logprobs) - math.fsum(other)
            for answer, other in zip(ours, ours_by_other, strict=True)
        ]
    )
    return Contest(
        taste=taste,
        model=model,
        against=against,
        prompts=len(ours),
        win_rate=found.value,
        win_rate_interval=(found.low, found.high),
        wins=outcomes.count(1.0),
        losses=outcomes.count(0.0),
        ties=outcomes.count(0.5),
        kl_nats=float(kl.mean()),
        kl_interval=bootstrap_mean(kl, CONFIDENCE, RESAMPLES),
        perplexity=_perplexity(ours_by_other),
        perplexity_against=_perplexity([answer.logprobs for answer in theirs]),
        tokens=_mean([answer.num_tokens for answer in ours]),
        tokens_against=_mean([answer.num_tokens for answer in theirs]),
        ended=_mean([answer.ended for answer in ours]),
        ended_against=_mean([answer.ended for answer in theirs]),
        mean_score=_mean(our_scores),
        mean_score_against=_mean(their_scores),
    )


async def best_of_ceiling(
    sampler: Sampler, tastes: Sequence[Taste], model: str, prompts: Sequence[str], draw: Draw
) -> dict[Taste, dict[str, float]]:
    """Return for each taste how often the best of four answers by it beats a fifth."""
    asked: list[heedful.Prompt] = [*prompts]
    drawn = [
        await sampler.answer(model, asked, Draw(draw.temperature, draw.max_tokens, draw.seed + i))
        for i in range(0, (BEST_OF + 1) * len(prompts), len(prompts))
    ]
    ceilings = {}
    for taste in tastes:
        scores = [[score(taste, item.text, item.ended) for item in answers] for answers in drawn]
        best = [max(column) for column in zip(*scores[:BEST_OF], strict=True)]
        _, found = _outcomes(best, scores[BEST_OF])
        ceilings[taste] = {"win_rate": found.value, "low": found.low, "high": found.high}
    return ceilings


def _outcomes(ours: Sequence[float], theirs: Sequence[float]) -> tuple[list[float], Paired]:
    outcomes = [outcome_of(a - b, TIE_WIDTH) for a, b in zip(ours, theirs, strict=True)]
    units = [str(idx) for idx in range(len(outcomes))]
    return outcomes, paired(units, outcomes, confidence=CONFIDENCE, resamples=RESAMPLES)


def _perplexity(scores: Sequence[Sequence[float]]) -> float:
    num_tokens = sum(len(item) for item in scores)
    return math.exp(-math.fsum(value for item in scores for value in item) / max(1, num_tokens))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))

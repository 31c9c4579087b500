"""Simulated users at a real server: they ask, get blind answers, and vote through the client.

Owns the course of one comparison and how many are under way. Every answer and vote carries the tag
`simulated` and a rater id that begins with `simulated:`, so that no table can mistake them for
people. Event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import heedful

from heedful_trainer.simulation.raters import TAG, ShownAnswer, SimulatedRater

_PAUSES_S = (1.0, 4.0, 16.0)  # a slow disk, or an engine that starts anew


@dataclass(frozen=True, slots=True)
class Asking:
    """How simulated users ask."""

    answers: int = 2  # shown side by side, 2 to 9
    max_tokens: int = 128
    temperature: float = 1.0
    concurrency: int = 12
    thumbs: bool = False  # up for the best answer and down for the worst, instead of an order
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote that is in the log."""

    comparison_id: str
    rater_id: str
    groups: tuple[tuple[int, ...], ...]
    seq: int  # 0 where a tie left nothing to say by thumbs


async def simulate_votes(
    client: heedful.AsyncClient,
    prompts: Sequence[str],
    raters: Sequence[SimulatedRater],
    asking: Asking,
    on_vote: Callable[[Vote], None] | None = None,
) -> list[Vote]:
    """Have each prompt answered and voted on, raters taking turns; return votes by prompt.

    Raises:
        HeedfulError: the server refused a comparison or a vote; those before it are in the log.
    """
    slots = asyncio.Semaphore(asking.concurrency)

    async def one(idx: int, prompt: str) -> Vote:
        async with slots:
            vote = await _vote(client, prompt, raters[idx % len(raters)], asking)
        if on_vote is not None:
            on_vote(vote)
        return vote

    tasks = [asyncio.create_task(one(idx, prompt)) for idx, prompt in enumerate(prompts)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _vote(
    client: heedful.AsyncClient, prompt: str, rater: SimulatedRater, asking: Asking
) -> Vote:
    comparison = await _compare(client, prompt, rater, asking)
    shown = [
        ShownAnswer(item.text, item.finish_reason is heedful.FinishReason.STOP)
        for item in comparison.candidates
    ]
    groups = rater.rank(shown)
    if asking.thumbs:
        seq = await _thumbs(client, comparison, groups, rater.rater_id)
    else:
        receipt = await client.rank(comparison, groups, rater_id=rater.rater_id, tags=[TAG])
        seq = receipt.seq
    return Vote(comparison.comparison_id, rater.rater_id, groups, seq)


async def _compare(
    client: heedful.AsyncClient, prompt: str, rater: SimulatedRater, asking: Asking
) -> heedful.Comparison:
    """Return two answers; where the server cannot just now, ask again as a user would."""
    for pause_s in (*_PAUSES_S, None):
        try:
            return await client.compare(
                prompt,
                asking.answers,
                purpose="learn",
                temperature=asking.temperature,
                max_tokens=asking.max_tokens,
                end_user=rater.rater_id,
                tags=[TAG],
                timeout_s=asking.timeout_s,
            )
        except heedful.Unavailable:
            if pause_s is None:
                raise
            await asyncio.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


async def _thumbs(
    client: heedful.AsyncClient,
    comparison: heedful.Comparison,
    groups: Sequence[Sequence[int]],
    rater_id: str,
) -> int:
    """Rate the best and the worst answer, none where all are tied; return the last position."""
    if len(groups) < 2:
        return 0
    seq = 0
    for group, up in ((groups[0], True), (groups[-1], False)):
        answer = comparison.candidates[group[0]]
        receipt = await client.rate(answer, up, rater_id=rater_id, tags=[TAG])
        seq = receipt.seq
    return seq

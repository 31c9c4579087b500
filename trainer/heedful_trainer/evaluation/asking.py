"""Both policies asked the same: answers, log-probs and rewards from the running server.

Owns that requests are alike for both, at background priority and outside the log (the gate's
sampler sees to that), that an item which does not fit the context is left out for both, and that a
full queue is waited for. Where version and baseline are the same policy it is asked once. Event
loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Generic, NamedTuple, TypeVar

import heedful

from heedful_trainer.gate.sampler import Answer, Draw, ScoreItem, ServerSampler
from heedful_trainer.gate.settings import SamplingSettings

T = TypeVar("T")
_BATCH = 16  # items of one call
_BATCHES = 8  # calls in flight: more items than these would fill the server's queue
_PAUSE_S = 1.0


class Both(NamedTuple, Generic[T]):
    """The same of the version and of the baseline."""

    version: T
    baseline: T


class Asker:
    """Asks a version and its baseline."""

    def __init__(
        self,
        client: heedful.AsyncClient,
        version: str,
        baseline: str,
        settings: SamplingSettings | None = None,
    ) -> None:
        self.client = client
        self.version = version
        self.baseline = baseline
        self._settings = settings or SamplingSettings()
        self._sampler = ServerSampler(client, self._settings)
        self._slots = asyncio.Semaphore(_BATCHES)

    @property
    def compares(self) -> bool:
        """False where version and baseline are the same policy."""
        return self.version != self.baseline

    async def answers(
        self, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> Both[list[Answer | None]]:
        """Return both policies' answer to each prompt; None where the prompt is too long.

        Prompt i is drawn with seed `draw.seed + i` by both.

        Raises:
            HeedfulError: the server is away, or knows a policy no more.
        """

        async def one(model: str, idx: int) -> Answer | None:
            shifted = Draw(draw.temperature, draw.max_tokens, draw.seed + idx)
            try:
                asked = [prompts[idx]]
                found = await self._patient(lambda: self._sampler.answer(model, asked, shifted))
            except heedful.InvalidRequest:
                return None
            return found[0]

        async def of(model: str) -> list[Answer | None]:
            return await together([one(model, idx) for idx in range(len(prompts))])

        return await self._both(of)

    async def scores(self, items: Sequence[ScoreItem]) -> Both[list[tuple[float, ...] | None]]:
        """Return under both policies the log-prob of each token of each completion.

        None stands for an item that is too long.

        Raises:
            HeedfulError: as for `answers`.
        """

        async def of(model: str) -> list[tuple[float, ...] | None]:
            batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
            found = await together([self._batch(model, batch) for batch in batches])
            return [scored for batch in found for scored in batch]

        return await self._both(of)

    async def rewards(self, items: Sequence[ScoreItem]) -> list[float]:
        """Return the reward model's score of each completion.

        Raises:
            FailedPrecondition: the project has no reward model.
            HeedfulError: as for `answers`.
        """

        async def of(batch: Sequence[ScoreItem]) -> list[float]:
            async with self._slots:
                scores = await self._patient(
                    lambda: self.client.score(
                        batch,
                        model=self.baseline,
                        reward=True,
                        priority="background",
                        timeout_s=self._settings.timeout_s,
                    )
                )
            return [score.reward for score in scores if score.reward is not None]

        batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
        found = await together([of(batch) for batch in batches])
        return [reward for batch in found for reward in batch]

    async def _batch(
        self, model: str, batch: Sequence[ScoreItem]
    ) -> list[tuple[float, ...] | None]:
        try:
            async with self._slots:
                return list(await self._patient(lambda: self._sampler.score(model, batch)))
        except heedful.InvalidRequest:
            if len(batch) == 1:
                return [None]
        # One item that does not fit refuses its whole batch.
        return [scored for item in batch for scored in await self._batch(model, [item])]

    async def _patient(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what a call returns; a full queue is asked again until the timeout is over."""
        end_s = time.monotonic() + self._settings.timeout_s
        while True:
            try:
                return await ask()
            except heedful.QueueFull as error:
                if time.monotonic() >= end_s:
                    raise
                await asyncio.sleep(error.retry_after_s or _PAUSE_S)

    async def _both(self, of: Callable[[str], Awaitable[T]]) -> Both[T]:
        version = await of(self.version)
        return Both(version, await of(self.baseline) if self.compares else version)


async def together(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Return what the calls return; the first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def kept(found: Both[list[T | None]]) -> tuple[list[int], Both[list[T]]]:
    """Return the positions that both policies have, and what is there."""
    places, ours, theirs = [], [], []
    for idx, (mine, other) in enumerate(zip(*found, strict=True)):
        if mine is not None and other is not None:
            places.append(idx)
            ours.append(mine)
            theirs.append(other)
    return places, Both(ours, theirs)

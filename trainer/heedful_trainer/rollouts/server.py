"""The source of rollouts in production: the running server, asked as any client asks it.

Owns how a policy under training gets into an ephemeral slot and stays there (its lease is renewed),
and what is done when the server goes away: wait, load again, ask again, and give up after a while.
Requests have purpose rollout (outside the log) and background priority, T = 1, nothing truncated.
Event loop of the drawer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import heedful
import structlog

from heedful_trainer.errors import StageFailed
from heedful_trainer.rollouts.records import Ids, Plan, Rollout

_T = TypeVar("_T")
_BASE = "base"
_MOST_SAMPLES = 16  # of one request
# What passes by itself: a restart of the server (UNAVAILABLE) or of its engine (not loaded).
_PASSING = (
    heedful.Unavailable,
    heedful.QueueFull,
    heedful.DeadlineExceeded,
    heedful.FailedPrecondition,
    heedful.Cancelled,
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server is asked."""

    concurrency: int = 32
    lease_s: int = 120
    timeout_s: float = 600.0  # for one request, which waits while people are served
    patience_s: float = 180.0  # how long the server may be away


class ServerSource:
    """Rollouts from a running server.

    Args:
        connect: opens a client on the loop that asks.
        run_id: the run whose adapters answer.
        settings: see there.
    """

    def __init__(
        self, connect: Callable[[], heedful.AsyncClient], run_id: str, settings: ServerSettings
    ) -> None:
        self._connect, self._run_id, self._settings = connect, run_id, settings

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        """Return the answers to a part of a plan.

        Raises:
            StageFailed: the server stays away, or refuses.
        """
        slots = asyncio.Semaphore(self._settings.concurrency)

        async def one(client: heedful.AsyncClient, position: int, prompt: Ids) -> list[Rollout]:
            async with slots:
                return await self._answers(client, plan, position, prompt)

        async with self._connect() as client, self._loaded(client, plan.policy):
            tasks = [
                asyncio.create_task(one(client, start + i, prompt))
                for i, prompt in enumerate(prompts)
            ]
            try:
                found = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [rollout for answers in found for rollout in answers]

    async def release(self, policy: str) -> None:
        """Free the slot; if that fails, the lease lapses anyway."""
        if not policy:
            return
        with suppress(heedful.HeedfulError):
            async with self._connect() as client:
                adapter = heedful.RunAdapter(self._run_id, policy)
                await client.unload_adapter(adapter, timeout_s=10.0)

    async def _answers(
        self, client: heedful.AsyncClient, plan: Plan, position: int, prompt: Ids
    ) -> list[Rollout]:
        found: list[Rollout] = []
        while len(found) < plan.samples:
            number = min(_MOST_SAMPLES, plan.samples - len(found))
            seed = plan.seed_of(position) + len(found)
            ask = partial(self._ask, client, plan, prompt, number, seed)
            generation = await self._patiently(client, plan.policy, ask)
            found += [_rollout(prompt, completion) for completion in generation.completions]
        return found

    async def _ask(
        self, client: heedful.AsyncClient, plan: Plan, prompt: Ids, number: int, seed: int
    ) -> heedful.Generation:
        generation = await client.generate(
            list(prompt),
            model=heedful.RunAdapter(self._run_id, plan.policy).model if plan.policy else _BASE,
            n=number,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            min_tokens=0,
            max_tokens=plan.max_tokens,
            seed=seed,
            logprobs=True,
            priority="background",
            purpose="rollout",
            timeout_s=self._settings.timeout_s,
        )
        if any(item.finish_reason not in _WHOLE for item in generation.completions):
            raise heedful.Cancelled("the server cut an answer short")
        return generation

    async def _patiently(
        self, client: heedful.AsyncClient, policy: str, ask: Callable[[], Awaitable[_T]]
    ) -> _T:
        """Ask until there is an answer; between attempts wait, and load the policy again."""
        until_s = time.monotonic() + self._settings.patience_s
        pause_s = 0.5
        while True:
            try:
                return await ask()
            except _PASSING as error:
                if time.monotonic() >= until_s:
                    raise StageFailed(
                        f"the server did not answer for {self._settings.patience_s:.0f} s: {error}"
                    ) from error
                structlog.get_logger().warning("rollouts_wait", reason=str(error))
            except heedful.HeedfulError as error:
                raise StageFailed(f"the server refuses rollouts: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(5.0, pause_s * 1.6)
            with suppress(*_PASSING):
                await self._load(client, policy)

    async def _load(self, client: heedful.AsyncClient, policy: str) -> None:
        if policy:
            adapter = heedful.RunAdapter(self._run_id, policy)
            await client.load_adapter(adapter, lease_s=self._settings.lease_s)

    @asynccontextmanager
    async def _loaded(self, client: heedful.AsyncClient, policy: str) -> AsyncIterator[None]:
        await self._patiently(client, "", partial(self._load, client, policy))
        renewing = asyncio.create_task(self._renew(client, policy))
        try:
            yield
        finally:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing

    async def _renew(self, client: heedful.AsyncClient, policy: str) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            try:
                await self._load(client, policy)
            except heedful.HeedfulError as error:
                # The requests themselves find out, and wait.
                structlog.get_logger().warning("rollout_policy_not_renewed", reason=str(error))


_WHOLE = (heedful.FinishReason.STOP, heedful.FinishReason.LENGTH)


def _rollout(prompt: Ids, completion: heedful.Completion) -> Rollout:
    logprobs = tuple(token.logprob for token in completion.logprobs)
    if len(logprobs) != len(completion.token_ids) or not logprobs:
        raise StageFailed(
            f"the server gave {len(logprobs)} log-probs for {len(completion.token_ids)} tokens"
        )
    ended = completion.finish_reason is heedful.FinishReason.STOP
    return Rollout(prompt, completion.token_ids, logprobs, ended)

"""Drawing rollouts beside the training: what is stored is reused, the rest is drawn and stored.

Owns the thread on which a source is asked, so that the rollouts of the next iteration are drawn
while this one is learned from, and the protocol `Source`. It knows neither gRPC nor losses. The
training thread calls `RolloutDrawer`; a source runs on an event loop in the drawer's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Protocol

from heedful_trainer.errors import RunStopped
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.rollouts.records import Ids, Plan, Rollout
from heedful_trainer.rollouts.store import RolloutStore

_LOOK_S = 0.2


class Source(Protocol):
    """What samples answers."""

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        """Return `plan.samples` answers to each of these prompts, in order.

        Args:
            plan: which policy, how, and the seeds.
            start: place of the first prompt within the plan.
            prompts: a part of the plan's.
        """
        ...

    async def release(self, policy: str) -> None:
        """A policy is not asked again."""
        ...


class RolloutDrawer:
    """Draws plans one after the other; use as a context manager, which ends its thread."""

    def __init__(self, source: Source, store: RolloutStore, part_size: int) -> None:
        self._source, self._store, self._part_size = source, store, part_size
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        self._begun: dict[Plan, Future[list[Rollout]]] = {}

    def __enter__(self) -> RolloutDrawer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, plan: Plan) -> None:
        """Start drawing a plan unless that has been done."""
        if plan not in self._begun:
            drawing = self._draw(plan)
            self._begun[plan] = asyncio.run_coroutine_threadsafe(drawing, self._loop)

    def take(self, plan: Plan, hooks: Hooks) -> list[Rollout]:
        """Return a plan's rollouts, waiting for them; they are on disk by then.

        Raises:
            StageFailed: the server or the disk failed for good.
            RunStopped: the hooks asked for the end.
        """
        self.begin(plan)
        future = self._begun[plan]
        while True:
            try:
                found = future.result(timeout=_LOOK_S)
            except NotYet:
                hooks.breathe()
                if hooks.wanted() == "stop":
                    raise RunStopped(f"stopped while {plan.name} was drawn") from None
                continue
            del self._begun[plan]
            return found

    def release(self, policy: str) -> None:
        """Let a policy go that is not asked again."""
        asyncio.run_coroutine_threadsafe(self._source.release(policy), self._loop).result()

    def close(self) -> None:
        """Cancel what is under way and end the thread."""
        for future in self._begun.values():
            future.cancel()
        for future in self._begun.values():
            with suppress(CancelledError):
                future.exception()
        self._begun.clear()
        asyncio.run_coroutine_threadsafe(_settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _draw(self, plan: Plan) -> list[Rollout]:
        found: list[Rollout] = []
        for start, prompts in plan.parts(self._part_size):
            part = await asyncio.to_thread(self._store.load, plan, start, prompts)
            if part is None:
                part = await self._source.draw(plan, start, prompts)
                await asyncio.to_thread(self._store.save, plan, start, part)
            found += part
        return found


async def _settle() -> None:
    """Wait until every cancelled task has ended, so that nothing is left when the loop closes."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)

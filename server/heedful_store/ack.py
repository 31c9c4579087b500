"""A write on its way to the disk, and how its outcome reaches the caller.

Owns the bridge from the writer's thread to event loops and to plain threads, so that every write
method exists once: ``await store.append_feedback(event)`` in a coroutine,
``store.append_feedback(event).result()`` elsewhere. It does not know what was written.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Generator, Iterable
from typing import Any, Generic, TypeVar

from heedful_store.errors import StoreError

R = TypeVar("R")


class Ack(Generic[R]):
    """Resolves after the commit, or raises the StoreError that prevented it.

    Cancelling the wait does not undo the write.
    """

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None
        self._future: asyncio.Future[R] | concurrent.futures.Future[R]
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
            self._future = concurrent.futures.Future()
        else:
            self._future = self._loop.create_future()

    def __await__(self) -> Generator[Any, None, R]:
        future = self._future
        if isinstance(future, concurrent.futures.Future):
            future = asyncio.wrap_future(future)
        return future.__await__()

    def result(self, timeout_s: float | None = None) -> R:
        """Wait in this thread; raise TimeoutError after ``timeout_s``, the write goes on."""
        if not isinstance(self._future, concurrent.futures.Future):
            raise RuntimeError("made in an event loop: await it instead")
        return self._future.result(timeout_s)


Settlement = tuple[Ack[Any], Any]  # an acknowledgement, and its result or StoreError


def settle(settlements: Iterable[Settlement]) -> None:
    """Hand outcomes to their waiters from any thread, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for ack, outcome in settlements:
        if ack._loop is None:
            _resolve(ack._future, outcome)
        else:
            assert isinstance(ack._future, asyncio.Future)
            by_loop.setdefault(ack._loop, []).append((ack._future, outcome))
    for loop, pairs in by_loop.items():
        # A closed loop has nobody left to tell; the rows are durable all the same.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve_all, pairs)


def _resolve_all(pairs: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in pairs:
        _resolve(future, outcome)


def _resolve(future: asyncio.Future[Any] | concurrent.futures.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, StoreError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

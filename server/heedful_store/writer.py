"""The one thread that writes: a bounded queue, group commit, acknowledgements after the commit.

Owns the order collect → one transaction → commit → acknowledge, and what each failure does to the
items in flight. It does not know what is written: a handler gets a connection and all items of its
kind, and returns one outcome per item, a StoreError being that item's refusal. A handler decides
all refusals before its first write, for nothing of the group is undone for the sake of one item.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection

from heedful_store.ack import Ack, settle
from heedful_store.errors import (
    StoreBusy,
    StoreClosed,
    StoreDead,
    StoreError,
    StoreFault,
    Unready,
)
from heedful_store.failpoints import Failpoints
from heedful_store.faults import fault_of
from heedful_store.sessions import WriteSession

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
R = TypeVar("R")
Handler = Callable[[Connection, Sequence[Item]], Sequence[R | StoreError]]


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """Limits of the queue and of a group."""

    queue_items: int = 8192  # waiting at most, else StoreBusy
    group_items: int = 512  # in one transaction at most
    idle_gap_s: float = 0.0003  # a group is closed when nothing arrives for this long
    linger_s: float = 0.003  # nor is it kept open longer than this


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one transaction did, for metrics; given to the observer in the writer's thread."""

    items: int  # in the group
    commit_s: float  # from begin to durable
    queued_items: int  # left waiting
    failure: type[StoreError] | None  # None: committed


@dataclass(slots=True)
class WriterStats:
    """Totals since the store was opened; read them from any thread."""

    groups: int = 0
    items: int = 0
    failed_groups: int = 0
    largest_group_items: int = 0
    commit_s: float = 0.0


@dataclass(slots=True)
class _Work:
    handler: Handler[Any, Any] | None  # None: alone is called instead
    item: Any
    alone: Callable[[], Any] | None
    ack: Ack[Any]


class Writer:
    """Runs handlers in groups on its own thread until closed or dead."""

    def __init__(
        self,
        session: WriteSession,
        options: WriterOptions,
        failpoints: Failpoints,
        observer: Callable[[GroupReport], None] | None = None,
    ) -> None:
        self.stats = WriterStats()
        self._session = session
        self._options = options
        self._failpoints = failpoints
        self._observer = observer
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders submissions before the end mark of close()
        self._closed = False
        self._death: str | None = None
        self._thread = threading.Thread(target=self._run, name="heedful-store-writer", daemon=True)
        self._thread.start()

    @property
    def death(self) -> str | None:
        """Return why the writer died, or None while it writes."""
        return self._death

    @property
    def queued_items(self) -> int:
        """Return how many items wait."""
        return self._queue.qsize()

    def submit(self, handler: Handler[Item, R], item: Item) -> Ack[R]:
        """Queue one item for its handler; raise StoreBusy, StoreDead or StoreClosed."""
        ack: Ack[R] = Ack()
        self._enqueue(_Work(handler, item, None, ack))
        return ack

    def submit_alone(self, work: Callable[[], R]) -> Ack[R]:
        """Queue work that runs between groups and calls ``transact`` and ``scrub`` itself."""
        ack: Ack[R] = Ack()
        self._enqueue(_Work(None, None, work, ack))
        return ack

    def close(self) -> None:
        """Write what waits, then end the thread and close the session."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def transact(self, body: Callable[[Connection], R], *, may_use_reserve: bool = True) -> R:
        """Run ``body`` in one transaction and return after its commit; writer's thread only.

        Raises a StoreError that says what failed. Any other exception comes out of ``body``
        itself, after a rollback.
        """
        self._refuse_if_dead()
        try:
            result = body(self._session.begin(may_use_reserve=may_use_reserve))
            self._failpoints.hit("before_commit")
        except Exception as error:
            self._roll_back()
            if (fault := self._fault(error, otherwise=None)) is not None:
                raise fault from error
            raise
        try:
            self._session.commit()
            self._failpoints.hit("after_commit")
        except Exception as error:
            self._roll_back()
            # Whatever a failed commit left behind, retrying it could acknowledge a lost write.
            raise self._fault(error, otherwise=StoreDead) or StoreDead from error
        return result

    def scrub(self) -> bool:
        """Make removed bytes leave the files; writer's thread only."""
        self._refuse_if_dead()
        try:
            return self._session.scrub()
        except Exception as error:
            raise self._fault(error, otherwise=StoreDead) or StoreDead from error

    def _roll_back(self) -> None:
        try:
            self._session.rollback()
        except Exception as error:
            # The next transaction would begin inside this one; nothing may be built on that.
            self._fault(error, otherwise=StoreDead)

    def _enqueue(self, work: _Work) -> None:
        with self._gate:
            if self._closed:
                raise StoreClosed
            self._refuse_if_dead()
            if self._queue.qsize() >= self._options.queue_items:
                raise StoreBusy
            self._queue.put(work)

    def _refuse_if_dead(self) -> None:
        if self._death is not None:
            raise StoreDead(self._death)

    def _fault(self, error: Exception, otherwise: type[Unready] | None) -> Unready | None:
        """Say which failure of the whole store ``error`` is, and die of it if it is that kind."""
        kind = fault_of(error) or otherwise
        if kind is None or not issubclass(kind, Unready):
            return None
        detail = error.detail if isinstance(error, StoreError) else str(error)
        if kind is StoreDead and self._death is None:
            self._death = detail
            _log.critical("the store stopped writing: %s", detail)
        return kind(detail)

    def _run(self) -> None:
        try:
            while (group := self._collect()) is not None:
                self._serve_or_die(group)
        finally:
            self._session.close()

    def _serve_or_die(self, group: list[_Work]) -> None:
        try:
            self._serve(group)
        except Exception as error:
            # A defect of the writer itself: nobody may wait for ever, nothing may be retried here.
            _log.critical("the store's writer failed", exc_info=error)
            self._death = self._death or f"{type(error).__name__}: {error}"
            settle((work.ack, StoreDead(self._death)) for work in group)

    def _collect(self) -> list[_Work] | None:
        first = self._queue.get()
        if first is None:
            return None
        group = [first]
        close_at_s = time.monotonic() + self._options.linger_s
        while len(group) < self._options.group_items and time.monotonic() < close_at_s:
            try:
                work = self._queue.get(timeout=self._options.idle_gap_s)
            except queue.Empty:
                break
            if work is None:
                self._queue.put(None)
                break
            group.append(work)
        return group

    def _serve(self, group: list[_Work]) -> None:
        batch = [work for work in group if work.handler is not None]
        if batch:
            self._serve_batch(batch)
        for work in group:
            if work.alone is not None:
                self._serve_alone(work, work.alone)

    def _serve_batch(self, batch: list[_Work]) -> None:
        started_s = time.monotonic()
        failure: type[StoreError] | None = None
        try:
            outcomes = self.transact(lambda c: _run_handlers(c, batch), may_use_reserve=False)
        except Unready as error:
            failure = type(error)
            # One exception object each: a traceback grows where it is raised.
            outcomes = [failure(error.detail) for _ in batch]
        except Exception as error:
            self._serve_suspects(batch, error)
            return
        report = GroupReport(len(batch), time.monotonic() - started_s, self._queue.qsize(), failure)
        self._count(report)
        if failure is None:
            self._failpoints.hit("before_ack")
        settle((work.ack, outcome) for work, outcome in zip(batch, outcomes, strict=True))
        if failure is None:
            self._release()
        self._observe(report)

    def _serve_suspects(self, batch: list[_Work], error: Exception) -> None:
        """Find the item that made a handler fail by running each one alone."""
        if len(batch) > 1:
            for work in batch:
                self._serve_batch([work])
            return
        fault = _as_store_error(error)
        report = GroupReport(1, 0.0, self._queue.qsize(), type(fault))
        self._count(report)
        settle([(batch[0].ack, fault)])
        self._observe(report)

    def _serve_alone(self, work: _Work, run: Callable[[], Any]) -> None:
        outcome: object
        try:
            outcome = run()
        except Exception as error:
            outcome = _as_store_error(error)
        settle([(work.ack, outcome)])
        self._release()

    def _release(self) -> None:
        try:
            self._session.release()
        except Exception as error:
            self._fault(error, otherwise=StoreDead)

    def _count(self, report: GroupReport) -> None:
        stats = self.stats
        stats.groups += 1
        stats.items += report.items
        stats.commit_s += report.commit_s
        stats.largest_group_items = max(stats.largest_group_items, report.items)
        stats.failed_groups += report.failure is not None

    def _observe(self, report: GroupReport) -> None:
        if self._observer is None:
            return
        try:
            self._observer(report)
        except Exception:
            # Metrics are the caller's code; they must not decide over durability.
            _log.exception("the observer of the store's writer failed")


def _run_handlers(connection: Connection, batch: list[_Work]) -> list[Any]:
    """Call each handler once with its items; return the outcomes in the order of ``batch``."""
    places: dict[Handler[Any, Any], list[int]] = {}
    for place, work in enumerate(batch):
        assert work.handler is not None
        places.setdefault(work.handler, []).append(place)
    outcomes: list[Any] = [None] * len(batch)
    for handler, indices in places.items():
        results = handler(connection, [batch[place].item for place in indices])
        for place, result in zip(indices, results, strict=True):
            outcomes[place] = result
    return outcomes


def _as_store_error(error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    _log.error("the store failed on one request", exc_info=error)
    return StoreFault(f"{type(error).__name__}: {error}")

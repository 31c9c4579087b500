"""An open database: its writer, its readers, how a transaction of either kind begins.

Owns the lifetime of the writer and of the reading connections. It does not know what is stored,
but for an erasure that a crash cut off. Reads may come from any thread; opening and closing from
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from heedful_store import erasure
from heedful_store.ack import Ack
from heedful_store.database import DatabaseOptions, open_database
from heedful_store.errors import StoreBusy, StoreFault
from heedful_store.failpoints import Failpoints
from heedful_store.faults import fault_of
from heedful_store.ids import now_ms
from heedful_store.writer import GroupReport, Writer, WriterOptions, WriterStats

R = TypeVar("R")


class OpenedStore:
    """An open database: one writer, many readers. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        database: DatabaseOptions | None = None,
        writer: WriterOptions | None = None,
        observer: Callable[[GroupReport], None] | None = None,
        failpoints: Failpoints | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        traps = failpoints or Failpoints.from_environment()
        opened = open_database(url, database or DatabaseOptions(), traps)
        self._readers = opened.readers
        self._clock = clock
        self._writer = Writer(opened.session, writer or WriterOptions(), traps, observer)
        self._finish_erasures()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, acknowledge it, and close; later writes raise StoreClosed."""
        # Readers first: the last connection to close empties the WAL, and only the writer may.
        self._readers.dispose()
        self._writer.close()

    def _finish_erasures(self) -> None:
        """Scrub the files for an erasure that a crash cut off between its commit and its scrub."""
        with self.read() as connection:
            waiting = erasure.unscrubbed(connection)
        if waiting:
            self._writer.submit_alone(lambda: erasure.scrub_leftovers(self._writer))

    @property
    def death(self) -> str | None:
        """Return why the store refuses all writes until it is reopened, or None."""
        return self._writer.death

    @property
    def stats(self) -> WriterStats:
        """Return the writer's totals, live."""
        return self._writer.stats

    @property
    def queued_items(self) -> int:
        """Return how many writes wait."""
        return self._writer.queued_items

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a reading transaction: all that it reads is the state of one instant.

        Raises StoreBusy when every reading connection is taken, and the store's other errors
        where the database fails.
        """
        try:
            with self._readers.connect() as connection:
                yield connection
        except PoolTimeout as error:
            raise StoreBusy("all reading connections are in use") from error
        except DBAPIError as error:
            raise (fault_of(error) or StoreFault)(str(error.orig)) from error

    def write(self, body: Callable[[Connection], R]) -> Ack[R]:
        """Run ``body`` in a transaction of its own in the writer's thread.

        A StoreError that it raises comes out of the Ack; any exception rolls back.
        """
        return self._writer.submit_alone(lambda: self._writer.transact(body))

"""The writer's own connection: how a transaction begins, becomes durable, and ends.

Owns the two databases' differences on the write side: for SQLite the lock file that lets only
one process write or checkpoint at a time, the checkpoints and the disk watermark; for PostgreSQL
reconnecting with backoff. It does not know what is written. Used by the writer thread alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError

from heedful_store.errors import StoreDead, StoreFull, StoreLocked, StoreUnavailable

_log = logging.getLogger(__name__)

# SQLite truncates the WAL to this when it starts over, so a longer one means work to do.
WAL_LIMIT_BYTES = 4 << 20
_CHECKPOINT_PAUSE_S = 0.1
_WATERMARK_PAUSE_S = 1.0
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.1, 5.0


class WriteSession(Protocol):
    """One writer's way to the database."""

    def begin(self, *, may_use_reserve: bool) -> Connection:
        """Start a transaction; raise Unready when that is not possible now."""

    def commit(self) -> None:
        """Return only when the transaction is durable."""

    def rollback(self) -> None:
        """Forget the transaction, whatever state it is in."""

    def release(self) -> None:
        """Do what may follow the acknowledgements, and let other processes write."""

    def scrub(self) -> bool:
        """Make removed bytes leave the files; say whether that is done."""

    def close(self) -> None:
        """Give the connection back."""


class SqliteSession:
    """SQLite: one connection, guarded by a lock file against writers of other processes.

    The lock file, not SQLite's own lock alone, keeps two connections from writing or
    checkpointing at once; that is what the WAL-reset bug of 3.7.0 to 3.51.2 needs to corrupt.
    """

    def __init__(
        self, engine: Engine, path: Path, *, lock_timeout_s: float, min_free_bytes: int
    ) -> None:
        self._connection = engine.connect()
        self._transaction: RootTransaction | None = None
        self._directory = path.parent
        self._wal_path = path.with_name(path.name + "-wal")
        self._lock_timeout_s = lock_timeout_s
        self._min_free_bytes = min_free_bytes
        self._lock_file = os.open(
            path.with_name(path.name + "-writer"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        self._next_checkpoint_s = 0.0
        self._next_watermark_s = 0.0

    def begin(self, *, may_use_reserve: bool) -> Connection:
        """Take both locks within the timeout; raise StoreLocked or StoreFull."""
        if not may_use_reserve:
            self._check_watermark()
        self._acquire()
        self._transaction = self._connection.begin()
        return self._connection

    def commit(self) -> None:
        """Commit and sync the WAL."""
        assert self._transaction is not None
        # sqlite3's commit() is silent when SQLite has already rolled back by itself.
        if not self._in_transaction():
            raise StoreDead("the transaction was gone before its commit")
        self._transaction.commit()
        self._transaction = None
        if self._in_transaction():
            raise StoreDead("the transaction was still open after its commit")

    def rollback(self) -> None:
        """Roll back and release the lock file; raise StoreDead when the transaction stays."""
        try:
            if self._transaction is not None:
                self._transaction.rollback()
            if self._in_transaction():
                raise StoreDead("a transaction could not be rolled back")
        finally:
            self._transaction = None
            self._unlock()

    def release(self) -> None:
        """Checkpoint when the WAL has grown, then let other processes write."""
        try:
            now_s = time.monotonic()
            if now_s >= self._next_checkpoint_s and self._wal_bytes() > WAL_LIMIT_BYTES:
                self._next_checkpoint_s = now_s + _CHECKPOINT_PAUSE_S
                self._checkpoint("PASSIVE")
        finally:
            self._unlock()

    def scrub(self) -> bool:
        """Copy the WAL into the database and cut it to nothing, once no reader needs it."""
        try:
            self._acquire()
        except StoreLocked:
            return False
        try:
            return self._checkpoint("TRUNCATE")
        finally:
            self._unlock()

    def close(self) -> None:
        """Close the connection; the last one of the machine also empties the WAL."""
        self._acquire_or_warn()
        self._connection.close()
        self._connection.engine.dispose()
        os.close(self._lock_file)

    def _checkpoint(self, mode: str) -> bool:
        busy, _, _ = self._driver().execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        return not busy

    def _in_transaction(self) -> bool:
        return self._driver().in_transaction

    def _driver(self) -> sqlite3.Connection:
        """Return the connection below SQLAlchemy, which would begin a transaction for a pragma."""
        driver = self._connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        return driver

    def _wal_bytes(self) -> int:
        try:
            return self._wal_path.stat().st_size
        except FileNotFoundError:
            return 0

    def _acquire(self) -> None:
        deadline_s = time.monotonic() + self._lock_timeout_s
        pause_s = 0.001
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise StoreLocked("another process is writing") from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.02)
            else:
                return

    def _acquire_or_warn(self) -> None:
        try:
            self._acquire()
        except StoreLocked:
            _log.warning("closing the store while another process writes")

    def _unlock(self) -> None:
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _check_watermark(self) -> None:
        now_s = time.monotonic()
        if self._min_free_bytes == 0 or now_s < self._next_watermark_s:
            return
        volume = os.statvfs(self._directory)
        if volume.f_bavail * volume.f_frsize < self._min_free_bytes and not self._has_free_pages():
            raise StoreFull(f"fewer than {self._min_free_bytes} bytes are free beside it")
        self._next_watermark_s = now_s + _WATERMARK_PAUSE_S

    def _has_free_pages(self) -> bool:
        """Say whether deletions left enough room inside the file to go on without growing."""
        (pages,) = self._driver().execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = self._driver().execute("PRAGMA page_size").fetchone()
        return bool(pages * page_bytes >= self._min_free_bytes)


class PostgresSession:
    """PostgreSQL: one connection, opened again with growing pauses after it was lost."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self._transaction: RootTransaction | None = None
        self._backoff_s = _BACKOFF_FIRST_S
        self._retry_at_s = 0.0

    def begin(self, *, may_use_reserve: bool) -> Connection:
        """Begin, connecting first if need be; raise StoreUnavailable while that fails."""
        if self._connection is None:
            self._connection = self._connect()
        self._transaction = self._connection.begin()
        return self._connection

    def commit(self) -> None:
        """Commit with synchronous_commit on."""
        assert self._transaction is not None
        self._transaction.commit()
        self._transaction = None

    def rollback(self) -> None:
        """Roll back; a connection that cannot even do that is dropped."""
        connection, self._connection, self._transaction = self._connection, None, None
        if connection is None:
            return
        try:
            connection.rollback()
        except DBAPIError:
            connection.invalidate()
        if connection.invalidated:
            connection.close()
        else:
            self._connection = connection

    def release(self) -> None:
        """Nothing follows a commit here; other writers are held off only by row locks."""

    def scrub(self) -> bool:
        """Report that this cannot be known: dead tuples and WAL archives are the server's."""
        return False

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _connect(self) -> Connection:
        now_s = time.monotonic()
        if now_s < self._retry_at_s:
            raise StoreUnavailable("waiting before the next attempt to connect")
        try:
            connection = self._engine.connect()
        except DBAPIError as error:
            self._retry_at_s = now_s + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, _BACKOFF_LAST_S)
            raise StoreUnavailable(str(error.orig)) from error
        self._backoff_s = _BACKOFF_FIRST_S
        return connection

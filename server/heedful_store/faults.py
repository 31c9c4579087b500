"""What an exception of the database means for the writer.

Owns the table from SQLite result codes and PostgreSQL SQLSTATEs to the store's errors. It does
not decide who is told; the writer does. Pure, any thread.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

from heedful_store.errors import (
    StoreDead,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    Unready,
)

_SQLITE_FAULTS: dict[int, type[Unready]] = {
    sqlite3.SQLITE_BUSY: StoreLocked,
    sqlite3.SQLITE_LOCKED: StoreLocked,
    sqlite3.SQLITE_FULL: StoreFull,
    sqlite3.SQLITE_IOERR: StoreDead,
    sqlite3.SQLITE_CORRUPT: StoreDead,
    sqlite3.SQLITE_NOTADB: StoreDead,
    sqlite3.SQLITE_CANTOPEN: StoreDead,
    sqlite3.SQLITE_READONLY: StoreDead,
    sqlite3.SQLITE_PROTOCOL: StoreDead,
}
_POSTGRES_FAULTS: dict[str, type[Unready]] = {
    "53100": StoreFull,  # disk_full
    "55P03": StoreLocked,  # lock_not_available
    "57014": StoreLocked,  # query_canceled, by statement_timeout
    "40P01": StoreLocked,  # deadlock_detected
    "40001": StoreLocked,  # serialization_failure
    "25006": StoreUnavailable,  # read_only_sql_transaction: a standby after a failover
    "53300": StoreUnavailable,  # too_many_connections
    "58030": StoreDead,  # io_error
    "XX001": StoreDead,  # data_corrupted
    "XX002": StoreDead,  # index_corrupted
}
# connection_exception, and operator_intervention (shutdown, crash, cannot connect now)
_POSTGRES_LOST_CLASSES = ("08", "57P")


def fault_of(error: Exception) -> type[StoreError] | None:
    """Return which failure of the store ``error`` is, or None when it is none that we know."""
    if isinstance(error, StoreError):
        return type(error)
    if isinstance(error, sqlite3.Error):
        # Extended result codes keep the primary one in the low byte. Errors that sqlite3 raises
        # by itself, such as a wrong number of parameters, have none.
        code = getattr(error, "sqlite_errorcode", None)
        return None if code is None else _SQLITE_FAULTS.get(code & 0xFF)
    if not isinstance(error, DBAPIError):
        return None
    if isinstance(error.orig, sqlite3.Error):
        return fault_of(error.orig)
    state = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated or (state is None and _is_operational(error)):
        return StoreUnavailable
    if state is None:
        return None
    if state.startswith(_POSTGRES_LOST_CLASSES):
        return StoreUnavailable
    return _POSTGRES_FAULTS.get(state)


def _is_operational(error: DBAPIError) -> bool:
    return type(error).__name__ in ("OperationalError", "InterfaceError")

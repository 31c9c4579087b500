"""Opening the database: engines, SQLite's settings and version check, migrations.

Owns everything that depends on the URL before the first row is written or read. It does not know
what is stored. Called at start-up, in the opening thread; a store is not shared across a fork.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text

from heedful_store.errors import SchemaMismatch
from heedful_store.failpoints import Failpoints
from heedful_store.schema import SCHEMA_REVISION
from heedful_store.sessions import (
    WAL_LIMIT_BYTES,
    PostgresSession,
    SqliteSession,
    WriteSession,
)

_log = logging.getLogger(__name__)

_WAL_RESET_BUG = ((3, 7, 0), (3, 51, 2))
# Any constant: it keeps two servers that start together from migrating PostgreSQL at once.
_MIGRATION_LOCK = 0x68656564


@dataclass(frozen=True, slots=True)
class DatabaseOptions:
    """How long to wait, and how much disk to leave."""

    lock_timeout_s: float = 2.0  # for another process's write
    min_free_bytes: int = 64 << 20  # appends are refused below this; 0 turns the check off
    readers: int = 16  # connections for reading, at most


@dataclass(frozen=True, slots=True)
class Database:
    """The two sides of an open database."""

    url: URL
    session: WriteSession  # for the writer's thread
    readers: Engine  # for everybody else


def open_database(url: str, options: DatabaseOptions, failpoints: Failpoints) -> Database:
    """Connect, bring the schema up to date, and return both sides.

    Raises SchemaMismatch for a database that a newer version wrote, ValueError for a URL that
    is neither a SQLite file nor PostgreSQL.
    """
    parsed = normalise_url(url)
    if parsed.get_backend_name() == "postgresql":
        return _open_postgres(parsed, options, failpoints)
    return _open_sqlite(parsed, options, failpoints)


def normalise_url(url: str) -> URL:
    """Return the URL with its driver; raise ValueError where no durable store can be."""
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(f"{backend}: the store needs sqlite:///FILE or postgresql://…")
    if parsed.database in (None, "", ":memory:"):
        raise ValueError("the store needs a file: memory is not durable")
    return parsed


def migrate(url: str) -> None:
    """Bring the schema of ``url`` up to date; nothing happens when it is."""
    open_and_close = open_database(url, DatabaseOptions(), Failpoints())
    open_and_close.session.close()
    open_and_close.readers.dispose()


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to ``revision``; "base" removes every table with its rows."""
    parsed = normalise_url(url)
    engine = _sqlite_writer_engine(parsed, 10.0) if _is_sqlite(parsed) else create_engine(parsed)
    with engine.begin() as connection:
        _lock_for_migration(connection)
        _alembic(connection, lambda command, config: command.downgrade(config, revision))
    engine.dispose()


def sqlite_warning(version: tuple[int, ...]) -> str | None:
    """Return what to tell the operator about this SQLite version, or None when it is sound."""
    first, last = _WAL_RESET_BUG
    if not first <= version <= last:
        return None
    name = ".".join(map(str, version))
    return (
        f"SQLite {name} has the WAL-reset bug (fixed in 3.51.3): connections that write or "
        "checkpoint at the same time can corrupt the database. heedful's own processes take turns "
        "through a lock file; do not write to the file with other programs while they run."
    )


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _open_sqlite(url: URL, options: DatabaseOptions, failpoints: Failpoints) -> Database:
    assert url.database is not None
    path = Path(url.database).absolute()
    _create_private_file(path)
    if warning := sqlite_warning(sqlite3.sqlite_version_info):
        _log.info(warning)
    writer = _sqlite_writer_engine(url, options.lock_timeout_s)
    session = SqliteSession(
        writer,
        path,
        lock_timeout_s=options.lock_timeout_s,
        min_free_bytes=options.min_free_bytes,
    )
    _upgrade(session, failpoints)
    return Database(url, session, _sqlite_reader_engine(url, options))


def _open_postgres(url: URL, options: DatabaseOptions, failpoints: Failpoints) -> Database:
    timeout_ms = int(options.lock_timeout_s * 1000)
    # The server's default may be weaker, and a receipt must not depend on it.
    settings = f"-c synchronous_commit=on -c lock_timeout={timeout_ms} -c statement_timeout=30000"
    arguments = {
        "options": settings,
        "connect_timeout": 5,
        # A server that vanished without closing its connections must not hold the writer for ever.
        "tcp_user_timeout": 10_000,
        "application_name": "heedful",
    }
    session = PostgresSession(create_engine(url, pool_size=1, connect_args=arguments))
    _upgrade(session, failpoints)
    readers = create_engine(
        url,
        pool_size=options.readers,
        max_overflow=0,
        pool_timeout=options.lock_timeout_s,
        pool_pre_ping=True,
        isolation_level="REPEATABLE READ",
        connect_args=arguments,
    )
    return Database(url, session, readers)


def _create_private_file(path: Path) -> None:
    """Create the file readable by its owner only; SQLite gives its side files the same mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            _log.warning("%s can be read by others; chmod 600 it", path)
        return
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _sqlite_writer_engine(url: URL, lock_timeout_s: float) -> Engine:
    engine = create_engine(
        url, pool_size=1, max_overflow=0, connect_args={"check_same_thread": False}
    )
    pragmas = (
        f"PRAGMA busy_timeout={int(lock_timeout_s * 1000)}",
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",
        "PRAGMA mmap_size=0",
        # The writer checkpoints by itself: SQLite's own hook would hide an I/O error.
        "PRAGMA wal_autocheckpoint=0",
        f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}",
        "PRAGMA secure_delete=ON",
    )
    _on_sqlite_connect(engine, pragmas, begin="BEGIN IMMEDIATE")
    return engine


def _sqlite_reader_engine(url: URL, options: DatabaseOptions) -> Engine:
    engine = create_engine(
        url,
        pool_size=options.readers,
        max_overflow=0,
        pool_timeout=options.lock_timeout_s,
        connect_args={"check_same_thread": False},
    )
    pragmas = (
        f"PRAGMA busy_timeout={int(options.lock_timeout_s * 1000)}",
        "PRAGMA mmap_size=0",
        "PRAGMA wal_autocheckpoint=0",
        "PRAGMA query_only=ON",
    )
    _on_sqlite_connect(engine, pragmas, begin="BEGIN")
    return engine


def _on_sqlite_connect(engine: Engine, pragmas: tuple[str, ...], *, begin: str) -> None:
    @event.listens_for(engine, "connect")
    def configure(driver: Any, _record: object) -> None:
        # sqlite3 would begin transactions at moments of its own choice, and never for a SELECT.
        driver.isolation_level = None
        for pragma in pragmas:
            driver.execute(pragma).fetchall()

    @event.listens_for(engine, "begin")
    def begin_now(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _upgrade(session: WriteSession, failpoints: Failpoints) -> None:
    connection = session.begin(may_use_reserve=True)
    try:
        _lock_for_migration(connection)
        revision = _revision(connection)
        if revision != SCHEMA_REVISION:
            _refuse_newer(connection, revision)
            _alembic(connection, lambda command, config: command.upgrade(config, "head"))
        failpoints.hit("before_migration_commit")
        session.commit()
    except BaseException:
        session.rollback()
        session.close()
        raise
    session.release()


def _lock_for_migration(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Rewriting a table may take as long as it needs, and so may another server's migration.
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(
        text("SELECT version_num FROM alembic_version")
    ).scalar_one_or_none()
    return found


def _refuse_newer(connection: Connection, revision: str | None) -> None:
    from alembic.script import ScriptDirectory

    known = {step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise SchemaMismatch(
            f"it has revision {revision}, this version knows up to {SCHEMA_REVISION}: "
            "use the heedful that wrote it, or a newer one"
        )


# Alembic is imported only when there is something to migrate: it costs a tenth of a second.
def _alembic(connection: Connection, run: Callable[[Any, Any], None]) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    run(command, config)


def _config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "heedful_store:migrations")
    config.set_main_option("path_separator", "os")
    return config

"""The numbers that order the log and the deployments.

Owns the counter rows. A row's lock is taken before anything is looked up and held until the
commit, so that a number is visible only after every smaller one: a reader's cursor never passes an
event. On SQLite the write lock does that, on PostgreSQL the row lock. Writer's thread only.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, select, update

from heedful_store.schema import counters

# Built once: SQLAlchemy then finds their compiled form without looking through them again.
_MINE = counters.c.name == "feedback"
_LOCK = select(counters.c.value).where(_MINE).with_for_update()
_ADVANCE = update(counters).where(_MINE).values(value=bindparam("last"))

_LOCK_DEPLOYMENTS = (
    select(counters.c.value).where(counters.c.name == "deployments").with_for_update()
)
_ADVANCE_DEPLOYMENTS = (
    update(counters).where(counters.c.name == "deployments").values(value=bindparam("last"))
)


def lock(connection: Connection) -> int:
    """Keep every other writer from numbering until the commit; return the last number given."""
    last: int = connection.execute(_LOCK).scalar_one()
    return last


def advance(connection: Connection, last: int) -> None:
    """Record the last number given, under the lock."""
    connection.execute(_ADVANCE, {"last": last})


def lock_registry(connection: Connection) -> int:
    """Keep every other writer from the registry until the commit; return the last deployment."""
    last: int = connection.execute(_LOCK_DEPLOYMENTS).scalar_one()
    return last


def advance_deployments(connection: Connection, last: int) -> None:
    """Record the id of the last deployment, under the lock."""
    connection.execute(_ADVANCE_DEPLOYMENTS, {"last": last})

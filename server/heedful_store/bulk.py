"""The statements of the hot path: many rows in, many names looked up, in constant SQL text.

Owns the two shapes where SQLAlchemy's own construction would cost more than the database: an
executemany of tuples, and "is one of these names" with the whole list as one parameter. It knows
no table. Writer's thread.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection

Value = str | int | float | bytes | None


def insert_rows(
    connection: Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Value, ...]]
) -> None:
    """Insert rows whose values stand in the order of ``columns``; no rows, no statement."""
    if not rows:
        return
    marks = ",".join([_mark(connection)] * len(columns))
    names = ",".join(columns)
    connection.exec_driver_sql(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(rows))


def select_by_name(
    connection: Connection, columns: str, table: str, column: str, names: Collection[str]
) -> Sequence[Any]:
    """Return the rows of ``table`` whose ``column`` is one of ``names``; no names, no rows."""
    if not names:
        return ()
    query = f"SELECT {columns} FROM {table} WHERE {column}"
    if connection.dialect.name == "sqlite":
        query += " IN (SELECT value FROM json_each(?))"
        return connection.exec_driver_sql(query, (json.dumps(list(names)),)).fetchall()
    return connection.exec_driver_sql(query + " = ANY(%s)", (list(names),)).fetchall()


def _mark(connection: Connection) -> str:
    return "?" if connection.dialect.name == "sqlite" else "%s"

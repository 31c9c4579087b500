"""Events that came before their target: resolved when it appears, dead-lettered when it does not.

Owns the second life of a pending event. Resolving gives it a new place for readers (``log_seq``)
at the end of the log, so that no cursor has passed it; ``seq``, which decides what is current,
stays. It does not accept events. Writer's thread only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, or_, select, update

from heedful_store import sequence
from heedful_store.errors import Invalid
from heedful_store.records import Scope
from heedful_store.schema import feedback, feedback_targets
from heedful_store.targets import Target, look_up, mark_voted

SWEEP_BATCH = 2000


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a pass over the waiting events did."""

    resolved: int  # their target appeared
    dead: int  # given up
    waiting: int  # still waiting, of those looked at


def resolve_waiting(
    connection: Connection,
    *,
    completion_ids: Sequence[str] = (),
    comparison_ids: Sequence[str] = (),
) -> None:
    """Let events go that wait for these targets, which the same transaction made visible."""
    ranked = select(feedback_targets.c.seq).where(
        feedback_targets.c.completion_id.in_(completion_ids)
    )
    condition = or_(
        feedback.c.completion_id.in_(completion_ids),
        feedback.c.comparison_id.in_(comparison_ids),
        feedback.c.seq.in_(ranked),
    )
    if _waiting(connection, condition):
        _resolve(connection, condition, now_ms=None, older_than_ms=0)


def sweep(connection: Connection, *, now_ms: int, older_than_ms: int) -> SweepReport:
    """Try the oldest waiting events again; give up those accepted before ``older_than_ms``."""
    condition = feedback.c.server_time_ms <= now_ms
    if not _waiting(connection, condition):
        return SweepReport(0, 0, 0)
    return _resolve(connection, condition, now_ms=now_ms, older_than_ms=older_than_ms)


def _waiting(connection: Connection, condition: ColumnElement[bool]) -> list[Row[Any]]:
    query = (
        select(feedback)
        .where(
            feedback.c.log_seq.is_(None),
            feedback.c.dead_at_ms.is_(None),
            feedback.c.erased_at_ms.is_(None),
            condition,
        )
        .order_by(feedback.c.server_time_ms, feedback.c.seq)
        .limit(SWEEP_BATCH)
    )
    return list(connection.execute(query))


def _resolve(
    connection: Connection,
    condition: ColumnElement[bool],
    *,
    now_ms: int | None,
    older_than_ms: int,
) -> SweepReport:
    last = sequence.lock(connection)
    # Read under the lock: another server may have resolved some of them since the first look.
    rows = _waiting(connection, condition)
    targets = [_target(row) for row in rows]
    visible = look_up(connection, targets)
    resolved: list[Row[Any]] = []
    dead: dict[int, str] = {}
    for row, target in zip(rows, targets, strict=True):
        try:
            is_visible = visible.admits(target)
        except Invalid as refusal:
            dead[row.seq] = refusal.reason
            continue
        if is_visible:
            resolved.append(row)
        elif row.server_time_ms < older_than_ms:
            dead[row.seq] = "its answer or comparison never appeared"
    # The clock of the rows is good enough where the caller has none: it only dates the marks.
    at_ms = now_ms if now_ms is not None else max((row.server_time_ms for row in rows), default=0)
    _let_go(connection, resolved, last, at_ms)
    for seq, reason in dead.items():
        mark = update(feedback).where(feedback.c.seq == seq)
        connection.execute(mark.values(dead_at_ms=at_ms, dead_reason=reason))
    return SweepReport(len(resolved), len(dead), len(rows) - len(resolved) - len(dead))


def _let_go(connection: Connection, rows: Sequence[Row[Any]], last: int, at_ms: int) -> None:
    """Give events their place for readers, after every number given so far."""
    if not rows:
        return
    for log_seq, row in enumerate(rows, start=last + 1):
        connection.execute(
            update(feedback).where(feedback.c.seq == row.seq).values(log_seq=log_seq)
        )
    sequence.advance(connection, last + len(rows))
    voted = [row.comparison_id for row in rows if row.comparison_id is not None]
    if voted:
        mark_voted(connection, voted, at_ms)


def _target(row: Row[Any]) -> Target:
    scope = Scope(row.tenant, row.project)
    if row.kind != "ranking":
        return Target(scope, (row.completion_id,), None, row.owner)
    groups = json.loads(row.value)["groups"]
    names = tuple(name for group in groups for name in group)
    return Target(scope, names, row.comparison_id, row.owner)

"""Blind comparisons: create, read, find the next one to ask.

Owns the two tables of comparisons; ``targets`` marks them as voted. It does not choose candidates
or draw their order; the server does, and records here what it drew. Functions take a connection:
writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, or_, select

from heedful_store.errors import AlreadyExists, Invalid, NotFound, StoreError
from heedful_store.records import Candidate, Comparison, Scope
from heedful_store.schema import comparison_candidates, comparisons
from heedful_store.waiting import resolve_waiting


def check(comparison: Comparison) -> None:
    """Raise Invalid unless the candidates make one set, shown in one order."""
    candidates = comparison.candidates
    if len(candidates) < 2:
        raise Invalid("candidates", "a comparison needs at least two")
    if len({candidate.completion_id for candidate in candidates}) < len(candidates):
        raise Invalid("candidates", "the same completion stands there twice")
    if {candidate.position for candidate in candidates} != set(range(len(candidates))):
        raise Invalid("candidates.position", "must number the places shown from 0")


def create(connection: Connection, items: Sequence[Comparison]) -> list[bool | StoreError]:
    """Store comparisons; True for a new one, AlreadyExists for an id that is taken."""
    ids = [item.comparison_id for item in items]
    query = select(comparisons.c.comparison_id).where(comparisons.c.comparison_id.in_(ids))
    taken = set(connection.scalars(query))
    outcomes: list[bool | StoreError] = []
    fresh: list[Comparison] = []
    for item in items:
        if item.comparison_id in taken:
            outcomes.append(AlreadyExists(f"comparison {item.comparison_id}"))
            continue
        taken.add(item.comparison_id)
        fresh.append(item)
        outcomes.append(True)
    if fresh:
        connection.execute(insert(comparisons), [_to_row(item) for item in fresh])
        connection.execute(insert(comparison_candidates), _candidate_rows(fresh))
        resolve_waiting(connection, comparison_ids=[item.comparison_id for item in fresh])
    return outcomes


def get(connection: Connection, scope: Scope, comparison_id: str) -> Comparison:
    """Return one comparison; raise NotFound, also for a foreign one."""
    found = get_many(connection, scope, [comparison_id])
    if not found:
        raise NotFound(f"comparison {comparison_id}")
    return found[comparison_id]


def get_many(
    connection: Connection, scope: Scope, comparison_ids: Iterable[str]
) -> dict[str, Comparison]:
    """Return those of the comparisons that exist in ``scope``, by id."""
    query = select(comparisons).where(
        _within(scope), comparisons.c.comparison_id.in_(list(comparison_ids))
    )
    rows = list(connection.execute(query))
    return _with_candidates(connection, rows)


def next_unanswered(
    connection: Connection, scope: Scope, *, limit: int, end_user: str | None = None
) -> list[Comparison]:
    """Return comparisons nobody has voted on, oldest first.

    With ``end_user`` only those shown to that user, or to nobody in particular.
    """
    conditions = [_within(scope), comparisons.c.voted_at_ms.is_(None)]
    conditions.append(comparisons.c.erased_at_ms.is_(None))
    if end_user is not None:
        conditions.append(or_(comparisons.c.end_user == end_user, comparisons.c.end_user == ""))
    query = (
        select(comparisons)
        .where(*conditions)
        .order_by(comparisons.c.created_at_ms, comparisons.c.comparison_id)
        .limit(limit)
    )
    return list(_with_candidates(connection, list(connection.execute(query))).values())


def _within(scope: Scope) -> Any:
    return and_(comparisons.c.tenant == scope.tenant, comparisons.c.project == scope.project)


def _to_row(item: Comparison) -> dict[str, Any]:
    return {
        "comparison_id": item.comparison_id,
        "tenant": item.scope.tenant,
        "project": item.scope.project,
        "end_user": item.end_user,
        "conversation_id": item.conversation_id,
        "purpose": item.purpose,
        "tags": json.dumps(item.tags),
        "created_at_ms": item.created_at_ms,
    }


def _candidate_rows(items: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [
        {
            "comparison_id": item.comparison_id,
            "candidate_idx": candidate_idx,
            "completion_id": candidate.completion_id,
            "policy_version": candidate.policy_version,
            "position": candidate.position,
            "propensity": candidate.propensity,
        }
        for item in items
        for candidate_idx, candidate in enumerate(item.candidates)
    ]


def _with_candidates(connection: Connection, rows: Sequence[Row[Any]]) -> dict[str, Comparison]:
    query = (
        select(comparison_candidates)
        .where(comparison_candidates.c.comparison_id.in_([row.comparison_id for row in rows]))
        .order_by(comparison_candidates.c.comparison_id, comparison_candidates.c.candidate_idx)
    )
    candidates: dict[str, list[Candidate]] = {}
    for row in connection.execute(query):
        candidates.setdefault(row.comparison_id, []).append(
            Candidate(row.completion_id, row.policy_version, row.position, row.propensity)
        )
    return {
        row.comparison_id: Comparison(
            comparison_id=row.comparison_id,
            scope=Scope(row.tenant, row.project),
            purpose=row.purpose,
            candidates=tuple(candidates.get(row.comparison_id, ())),
            created_at_ms=row.created_at_ms,
            end_user=row.end_user,
            conversation_id=row.conversation_id,
            tags=tuple(json.loads(row.tags)),
            voted_at_ms=row.voted_at_ms,
        )
        for row in rows
    }

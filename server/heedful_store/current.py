"""Reading the log of feedback: one event, lists, the reader's cursor, and what is current.

Owns the view "current" and the translation of rows into StoredFeedback. An event is current when
its target was found, nothing retracted its chain, no edit supersedes it, and the same rater said
nothing of the same kind about the same target later (by ``seq``, never by a client's clock); each
critique stands by itself. What was replaced does not come back when the later event is retracted.
Reads only, any thread, any connection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    and_,
    exists,
    func,
    or_,
    select,
)

from heedful_store.errors import NotFound
from heedful_store.feedback import state_of
from heedful_store.judgements import decode
from heedful_store.records import (
    FeedbackEvent,
    FeedbackFilter,
    FeedbackState,
    Scope,
    StoredFeedback,
)
from heedful_store.schema import completions, feedback, feedback_payloads, feedback_targets

PAGE_ROWS = 1000

Read = Callable[[], AbstractContextManager[Connection]]  # opens a reading transaction


def is_retracted(f: FromClause) -> ColumnElement[bool]:
    """Return the condition that somebody took back the chain of the event in ``f``."""
    r = feedback.alias()
    return exists().where(
        r.c.root_id == f.c.root_id,
        r.c.supersedes_id.is_not(None),
        r.c.kind == "retraction",
        *_same_unindexed(r, f, "rater_id", "tenant", "project"),
    )


def is_superseded(f: FromClause) -> ColumnElement[bool]:
    """Return the condition that the event in ``f`` was edited, or replaced by a later one."""
    later = feedback.alias()
    replaced = exists().where(
        later.c.target_id == f.c.target_id,
        _same_rater(later, f),
        later.c.kind == f.c.kind,
        later.c.seq > f.c.seq,
        # An original that arrives after its own edit is no later opinion.
        ~_is_edited(later),
    )
    return or_(_is_edited(f), and_(f.c.kind != "critique", replaced))


def is_current(f: FromClause) -> ColumnElement[bool]:
    """Return the condition that the event in ``f`` counts."""
    return and_(
        f.c.kind != "retraction",
        f.c.log_seq.is_not(None),
        f.c.dead_at_ms.is_(None),
        f.c.erased_at_ms.is_(None),
        ~is_superseded(f),
        ~is_retracted(f),
    )


def get(connection: Connection, scope: Scope, feedback_id: str) -> StoredFeedback:
    """Return one event in whatever state; raise NotFound, also for a foreign one."""
    query = _events().where(_within(scope), feedback.c.feedback_id == feedback_id)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"feedback {feedback_id}")
    return from_row(row)


def find(
    connection: Connection, criteria: FeedbackFilter, *, after_seq: int = 0, limit: int = 100
) -> list[StoredFeedback]:
    """Return up to ``limit`` events after ``after_seq`` that match, in order of ``seq``."""
    query = _events().where(feedback.c.seq > after_seq, *_conditions(criteria))
    return _fetch(connection, query.order_by(feedback.c.seq).limit(limit))


def since(
    connection: Connection, scope: Scope, cursor: int, *, limit: int = PAGE_ROWS
) -> list[StoredFeedback]:
    """Return events whose ``log_seq`` lies after ``cursor``, in that order, retractions included.

    The last one's ``log_seq`` is the next cursor. Nothing appears later at or before it.
    """
    query = _events().where(_within(scope), feedback.c.log_seq > cursor)
    return _fetch(connection, query.order_by(feedback.c.log_seq).limit(limit))


def iterate(read: Read, criteria: FeedbackFilter) -> Iterator[StoredFeedback]:
    """Yield all events that match, in order of ``seq``, in short transactions of one page.

    A long export therefore neither blocks checkpoints nor sees one instant of the log.
    """
    after_seq = 0
    while True:
        with read() as connection:
            page = find(connection, criteria, after_seq=after_seq, limit=PAGE_ROWS)
        yield from page
        if len(page) < PAGE_ROWS:
            return
        after_seq = page[-1].seq


def last_log_seq(connection: Connection, scope: Scope) -> int:
    """Return the newest cursor of a scope, 0 for an empty log."""
    query = select(func.max(feedback.c.log_seq)).where(_within(scope))
    return connection.execute(query).scalar_one() or 0


def backlog(connection: Connection, scope: Scope, cursor: int) -> int:
    """Return how many current events lie after ``cursor``."""
    query = select(func.count()).select_from(feedback)
    conditions = (_within(scope), feedback.c.log_seq > cursor, is_current(feedback))
    count: int = connection.execute(query.where(*conditions)).scalar_one()
    return count


def _events() -> Select[Any]:
    return select(feedback, feedback_payloads.c.text, feedback_payloads.c.comment).select_from(
        feedback.outerjoin(feedback_payloads, feedback.c.seq == feedback_payloads.c.seq)
    )


def _fetch(connection: Connection, query: Select[Any]) -> list[StoredFeedback]:
    return [from_row(row) for row in connection.execute(query)]


def from_row(row: Row[Any]) -> StoredFeedback:
    """Return the event of a joined row of feedback and its payload."""
    state = state_of(row.log_seq, row.dead_at_ms, row.erased_at_ms)
    return StoredFeedback(
        event=_event(row) if state != "erased" else None,
        feedback_id=row.feedback_id,
        seq=row.seq,
        log_seq=row.log_seq,
        server_time_ms=row.server_time_ms,
        state=state,
        dead_reason=row.dead_reason or "",
    )


def _event(row: Row[Any]) -> FeedbackEvent | None:
    judgement = decode(row.kind, row.value, row.text)
    if judgement is None:
        return None
    return FeedbackEvent(
        feedback_id=row.feedback_id,
        scope=Scope(row.tenant, row.project),
        judgement=judgement,
        rater_id=row.rater_id,
        rater_kind=row.rater_kind,
        completion_id=row.completion_id,
        comparison_id=row.comparison_id,
        comment=row.comment,
        supersedes_id=row.supersedes_id,
        consent_train=row.consent_train,
        tags=tuple(json.loads(row.tags)),
        client_time_ms=row.client_time_ms,
        source=row.source,
        key_id=row.key_id,
    )


def _within(scope: Scope) -> ColumnElement[bool]:
    return and_(feedback.c.tenant == scope.tenant, feedback.c.project == scope.project)


def _same_rater(a: FromClause, b: FromClause) -> ColumnElement[bool]:
    return and_(a.c.rater_id == b.c.rater_id, a.c.tenant == b.c.tenant, a.c.project == b.c.project)


def _is_edited(f: FromClause) -> ColumnElement[bool]:
    edit = feedback.alias()
    return exists().where(
        edit.c.supersedes_id == f.c.feedback_id,
        edit.c.kind == f.c.kind,
        *_same_unindexed(edit, f, "target_id", "rater_id", "tenant", "project"),
    )


def _same_unindexed(a: FromClause, b: FromClause, *names: str) -> list[ColumnElement[bool]]:
    """Return that columns are equal, in a form for which no index is chosen.

    Without statistics a database takes the index that names most of the columns, and with it
    reads all events of a busy rater for every single event. The chain's own index finds few.
    """
    return [func.coalesce(a.c[name], "") == b.c[name] for name in names]


def _conditions(criteria: FeedbackFilter) -> Sequence[ColumnElement[bool]]:
    f = feedback.c
    conditions = [_within(criteria.scope), _in_states(criteria.states)]
    if criteria.kinds:
        conditions.append(f.kind.in_(criteria.kinds))
    if criteria.rater_id is not None:
        conditions.append(f.rater_id == criteria.rater_id)
    if criteria.comparison_id is not None:
        conditions.append(f.comparison_id == criteria.comparison_id)
    if criteria.completion_id is not None:
        conditions.append(_concerns(completions.c.completion_id == criteria.completion_id))
    if criteria.end_user is not None:
        conditions.append(_concerns(completions.c.end_user == criteria.end_user))
    if criteria.policy_version is not None:
        conditions.append(_concerns(completions.c.policy_version == criteria.policy_version))
    if criteria.tag is not None:
        # Quotes bound the tag inside the JSON array, and json.dumps escapes any within it.
        conditions.append(f.tags.contains(json.dumps(criteria.tag), autoescape=True))
    if criteria.since_ms is not None:
        conditions.append(f.server_time_ms >= criteria.since_ms)
    if criteria.until_ms is not None:
        conditions.append(f.server_time_ms < criteria.until_ms)
    if criteria.current_only:
        conditions.append(is_current(feedback))
    return conditions


def _concerns(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that an event is about an answer, alone or in a ranking."""
    mine = and_(completions.c.tenant == feedback.c.tenant, condition)
    ranked = select(feedback_targets.c.seq).join(
        completions, completions.c.completion_id == feedback_targets.c.completion_id
    )
    return or_(
        exists().where(completions.c.completion_id == feedback.c.completion_id, mine),
        feedback.c.seq.in_(
            ranked.where(feedback_targets.c.seq == feedback.c.seq, mine).correlate(feedback)
        ),
    )


def _in_states(states: Sequence[FeedbackState]) -> ColumnElement[bool]:
    f = feedback.c
    alive = and_(f.erased_at_ms.is_(None), f.dead_at_ms.is_(None))
    meanings: dict[FeedbackState, ColumnElement[bool]] = {
        "stored": and_(alive, f.log_seq.is_not(None)),
        "pending": and_(alive, f.log_seq.is_(None)),
        "dead": and_(f.erased_at_ms.is_(None), f.dead_at_ms.is_not(None)),
        "erased": f.erased_at_ms.is_not(None),
    }
    return or_(*(meanings[state] for state in states))

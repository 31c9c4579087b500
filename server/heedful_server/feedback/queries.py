"""Questions to the store's tables that its own front door does not answer.

Owns the SQL, over the store's public schema, and nothing else. Reads only: every function takes a
connection of `Store.read` and runs in a worker thread.
"""

from collections.abc import Iterable, Sequence

from heedful_store import RunUse, Scope
from heedful_store import current as current_view
from heedful_store.eligibility import Standing
from heedful_store.registry_schema import deployments, run_inputs, runs
from heedful_store.schema import (
    comparison_candidates,
    comparisons,
    completion_payloads,
    completions,
    feedback,
)
from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

# How many of the oldest open questions are weighed against each other.
MOST_QUESTIONS = 64


def standings(connection: Connection, seqs: Sequence[int]) -> dict[int, Standing]:
    """Return of each event whether later ones took it back or replaced it."""
    f = feedback
    query = select(f.c.seq, current_view.is_retracted(f), current_view.is_superseded(f)).where(
        f.c.seq.in_(seqs)
    )
    found: dict[int, Standing] = {}
    for seq, is_retracted, is_superseded in connection.execute(query):
        found[seq] = "superseded" if is_superseded else "current"
        if is_retracted:
            found[seq] = "retracted"
    return found


def uses(connection: Connection, scope: Scope, seqs: Sequence[int]) -> dict[int, list[RunUse]]:
    """Return the runs that read each event, oldest first."""
    promoted = (
        select(func.min(deployments.c.at_ms))
        .where(
            deployments.c.tenant == scope.tenant,
            deployments.c.project == scope.project,
            deployments.c.action == "promote",
            deployments.c.version == runs.c.policy_version,
        )
        .scalar_subquery()
    )
    query = (
        select(
            run_inputs.c.feedback_seq,
            runs.c.run_id,
            runs.c.dataset_id,
            run_inputs.c.split,
            runs.c.policy_version,
            promoted,
        )
        .join(runs, runs.c.run_id == run_inputs.c.run_id)
        .where(
            run_inputs.c.feedback_seq.in_(seqs),
            runs.c.tenant == scope.tenant,
            runs.c.project == scope.project,
        )
        .order_by(runs.c.created_at_ms)
    )
    found: dict[int, list[RunUse]] = {}
    for seq, *values in connection.execute(query):
        found.setdefault(seq, []).append(RunUse(*values))
    return found


def blind(connection: Connection, scope: Scope, completion_ids: Iterable[str]) -> set[str]:
    """Return those of the answers that are candidates of a comparison without a vote."""
    query = (
        select(comparison_candidates.c.completion_id)
        .join(comparisons, comparisons.c.comparison_id == comparison_candidates.c.comparison_id)
        .where(
            comparison_candidates.c.completion_id.in_(list(completion_ids)),
            comparisons.c.tenant == scope.tenant,
            comparisons.c.project == scope.project,
            comparisons.c.voted_at_ms.is_(None),
        )
    )
    return set(connection.scalars(query))


def open_questions(
    connection: Connection, scope: Scope, end_user: str | None, limit: int = MOST_QUESTIONS
) -> tuple[list[str], int]:
    """Return the oldest comparisons without a vote that can still be shown, and how many there are;
    with `end_user` only those shown to that user, or to nobody in particular.
    """
    c = comparisons.c
    lacks_text = (
        select(comparison_candidates.c.comparison_id)
        .outerjoin(
            completion_payloads,
            completion_payloads.c.completion_id == comparison_candidates.c.completion_id,
        )
        .where(
            comparison_candidates.c.comparison_id == c.comparison_id,
            completion_payloads.c.completion_id.is_(None),
        )
    )
    conditions: list[ColumnElement[bool]] = [
        c.tenant == scope.tenant,
        c.project == scope.project,
        c.voted_at_ms.is_(None),
        c.erased_at_ms.is_(None),
        ~lacks_text.correlate(comparisons).exists(),
    ]
    if end_user is not None:
        conditions.append(or_(c.end_user == end_user, c.end_user == ""))
    oldest = (
        select(c.comparison_id)
        .where(*conditions)
        .order_by(c.created_at_ms, c.comparison_id)
        .limit(limit)
    )
    count = select(func.count()).select_from(comparisons).where(*conditions)
    return list(connection.scalars(oldest)), connection.execute(count).scalar_one()


def trained_cursor(connection: Connection, scope: Scope) -> int:
    """Return the place in the log up to which a training run has read."""
    query = select(func.max(runs.c.to_log_seq)).where(
        runs.c.tenant == scope.tenant, runs.c.project == scope.project, runs.c.status != "failed"
    )
    return connection.execute(query).scalar() or 0


def scopes(connection: Connection) -> list[Scope]:
    """Return every tenant's projects that have answers in the log."""
    query = select(completions.c.tenant, completions.c.project).distinct()
    return [Scope(*row) for row in connection.execute(query)]


def event_counts(connection: Connection) -> dict[str, int]:
    """Return how many events are current, replaced or withdrawn, waiting, given up, or erased."""
    f = feedback.c
    alive = and_(f.dead_at_ms.is_(None), f.erased_at_ms.is_(None))
    is_logged = and_(f.log_seq.is_not(None), alive)
    is_current = current_view.is_current(feedback)
    conditions = {
        "current": is_current,
        "not_current": and_(is_logged, ~is_current),
        "pending": and_(f.log_seq.is_(None), alive),
        "dead": and_(f.dead_at_ms.is_not(None), f.erased_at_ms.is_(None)),
        "erased": f.erased_at_ms.is_not(None),
    }
    count = select(func.count()).select_from(feedback)
    return {
        state: connection.execute(count.where(condition)).scalar_one()
        for state, condition in conditions.items()
    }


def has_data_elsewhere(connection: Connection, scope: Scope, end_user: str) -> bool:
    """Say whether a person has answers or judgements in other projects of the tenant."""
    answers = exists().where(
        completions.c.tenant == scope.tenant,
        completions.c.project != scope.project,
        completions.c.end_user == end_user,
    )
    events = exists().where(
        feedback.c.tenant == scope.tenant,
        feedback.c.project != scope.project,
        feedback.c.rater_id == end_user,
    )
    return bool(connection.execute(select(or_(answers, events))).scalar())

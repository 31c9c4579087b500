"""Forgetting a person: content removed, rows emptied, descendants marked.

Owns what "erased" means in each table, in one transaction. It does not schedule the rebuild of
policies; the report and the marks say which need one. That the bytes also leave the files is the
session's work (``scrub``), recorded here. Writer's thread only.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, Connection, and_, delete, or_, select, tuple_, update

from heedful_store.errors import Invalid
from heedful_store.ids import now_ms, uuid7
from heedful_store.registry_schema import policies, run_inputs, runs
from heedful_store.schema import (
    comparisons,
    completion_payloads,
    completions,
    erasures,
    feedback,
    feedback_payloads,
    feedback_targets,
)
from heedful_store.writer import Writer

PolicyName = tuple[str, str]  # project, version


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """What an erasure did, and what remains to be done."""

    erasure_id: str  # UUIDv7
    completions: int  # answers emptied
    feedback: int  # events emptied
    tainted_runs: tuple[str, ...]  # trained on the person's data
    tainted_policies: tuple[PolicyName, ...]  # came out of those runs, or started from them
    scrubbed: bool  # True: the bytes have left the files, and not only the tables


def erase_user(writer: Writer, tenant: str, end_user: str) -> ErasureReport:
    """Erase a person in one transaction, then scrub the files; raise Invalid without a name.

    A crash in between leaves a mark by which ``scrub_leftovers`` finishes at the next start.
    """
    if not end_user:
        raise Invalid("end_user", "must not be empty")
    report = writer.transact(lambda connection: _erase(connection, tenant, end_user))
    return replace(report, scrubbed=scrub_leftovers(writer))


def scrub_leftovers(writer: Writer) -> bool:
    """Scrub the files if an erasure still waits for that; False when it could not be done now."""
    waiting = writer.transact(unscrubbed)
    if not waiting:
        return True
    if not writer.scrub():
        return False
    done = update(erasures).where(erasures.c.erasure_id.in_(waiting))
    writer.transact(lambda c: c.execute(done.values(scrubbed_at_ms=now_ms())).rowcount)
    return True


def unscrubbed(connection: Connection) -> list[str]:
    """Return the erasures whose bytes may still be in the files."""
    query = select(erasures.c.erasure_id).where(erasures.c.scrubbed_at_ms.is_(None))
    return list(connection.scalars(query))


def _erase(connection: Connection, tenant: str, end_user: str) -> ErasureReport:
    at_ms = now_ms()
    pseudonym = f"erased:{secrets.token_hex(8)}"
    theirs = and_(completions.c.tenant == tenant, completions.c.end_user == end_user)
    answers = list(connection.scalars(select(completions.c.completion_id).where(theirs)))
    events = _events_about(connection, tenant, end_user)
    tainted_runs = _runs_with(connection, events)
    tainted_policies = _descendants(connection, tenant, tainted_runs)
    _empty_completions(connection, tenant, end_user, pseudonym, at_ms)
    _empty_comparisons(connection, tenant, end_user, pseudonym, at_ms)
    _empty_feedback(connection, events, tenant, end_user, pseudonym, at_ms)
    _taint(connection, tenant, tainted_runs, tainted_policies, at_ms)
    report = ErasureReport(
        uuid7(at_ms), len(answers), len(events), tuple(tainted_runs), tainted_policies, False
    )
    connection.execute(
        erasures.insert().values(
            erasure_id=report.erasure_id,
            tenant=tenant,
            pseudonym=pseudonym,
            erased_at_ms=at_ms,
            completions=report.completions,
            feedback=report.feedback,
            tainted_runs=json.dumps(tainted_runs),
            tainted_policies=json.dumps(tainted_policies),
        )
    )
    return report


def _events_about(connection: Connection, tenant: str, end_user: str) -> list[int]:
    """Return the events that the person wrote, and those that others wrote about their answers.

    A correction by somebody else repeats the answer, so it goes too.
    """
    mine = and_(completions.c.tenant == tenant, completions.c.end_user == end_user)
    answers = select(completions.c.completion_id).where(mine)
    ranked = select(feedback_targets.c.seq).where(feedback_targets.c.completion_id.in_(answers))
    query = select(feedback.c.seq).where(
        feedback.c.tenant == tenant,
        feedback.c.erased_at_ms.is_(None),
        or_(
            feedback.c.rater_id == end_user,
            feedback.c.owner == end_user,
            feedback.c.completion_id.in_(answers),
            feedback.c.seq.in_(ranked),
        ),
    )
    return list(connection.scalars(query))


def _runs_with(connection: Connection, events: Sequence[int]) -> list[str]:
    found: set[str] = set()
    for some in _batches(events):
        query = select(run_inputs.c.run_id).where(
            run_inputs.c.feedback_seq.in_(some), run_inputs.c.split != "excluded"
        )
        found.update(connection.scalars(query.distinct()))
    return sorted(found)


def _batches(events: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut a list to what one statement may name on either database."""
    for start in range(0, len(events), 500):
        yield events[start : start + 500]


def _empty_completions(
    connection: Connection, tenant: str, end_user: str, pseudonym: str, at_ms: int
) -> None:
    mine = and_(completions.c.tenant == tenant, completions.c.end_user == end_user)
    answers = select(completions.c.completion_id).where(mine)
    connection.execute(
        delete(completion_payloads).where(completion_payloads.c.completion_id.in_(answers))
    )
    # Which answers were compared is kept, under the pseudonym; what they said is gone.
    connection.execute(
        update(completions)
        .where(mine)
        .values(
            end_user=pseudonym,
            conversation_id="",
            request_id="",
            tags="[]",
            sampling="{}",
            seed=None,
            prompt_hash="",
            consent_train=False,
            erased_at_ms=at_ms,
        )
    )


def _empty_comparisons(
    connection: Connection, tenant: str, end_user: str, pseudonym: str, at_ms: int
) -> None:
    connection.execute(
        update(comparisons)
        .where(comparisons.c.tenant == tenant, comparisons.c.end_user == end_user)
        .values(end_user=pseudonym, conversation_id="", tags="[]", erased_at_ms=at_ms)
    )


def _empty_feedback(
    connection: Connection,
    events: Sequence[int],
    tenant: str,
    end_user: str,
    pseudonym: str,
    at_ms: int,
) -> None:
    for some in _batches(events):
        connection.execute(delete(feedback_payloads).where(feedback_payloads.c.seq.in_(some)))
        connection.execute(delete(feedback_targets).where(feedback_targets.c.seq.in_(some)))
        connection.execute(
            update(feedback)
            .where(feedback.c.seq.in_(some))
            .values(value="", tags="[]", digest=b"", client_time_ms=None, erased_at_ms=at_ms)
        )
    for column in (feedback.c.rater_id, feedback.c.owner):
        connection.execute(
            update(feedback)
            .where(feedback.c.tenant == tenant, column == end_user)
            .values({column: pseudonym})
        )


def _descendants(
    connection: Connection, tenant: str, tainted_runs: Sequence[str]
) -> tuple[PolicyName, ...]:
    """Return the policies of the runs, and those whose weights continue from them."""
    tainted: set[PolicyName] = set()
    made_by = policies.c.run_id.in_(tainted_runs)
    condition: ColumnElement[bool] = made_by
    names = (policies.c.project, policies.c.version)
    while True:
        query = select(*names).where(policies.c.tenant == tenant, condition)
        found = {(row.project, row.version) for row in connection.execute(query)} - tainted
        if not found:
            return tuple(sorted(tainted))
        tainted |= found
        condition = and_(
            policies.c.inherits_lineage,
            tuple_(policies.c.project, policies.c.parent_version).in_(sorted(tainted)),
        )


def _taint(
    connection: Connection,
    tenant: str,
    tainted_runs: Sequence[str],
    tainted_policies: Sequence[PolicyName],
    at_ms: int,
) -> None:
    if tainted_runs:
        mark = update(runs).where(runs.c.run_id.in_(tainted_runs))
        connection.execute(mark.values(tainted_at_ms=at_ms))
    if tainted_policies:
        names = tuple_(policies.c.project, policies.c.version).in_(tainted_policies)
        mark = update(policies).where(policies.c.tenant == tenant, names)
        connection.execute(mark.values(tainted_at_ms=at_ms))

"""Refresh runs: queued, leased by one worker at a time, controlled, finished.

Owns the tables of runs and of their inputs, and the rules of the lease: only its holder changes a
run, a lapsed lease can be taken by anybody. What a run does is the trainer's matter. Times come
from the caller. Writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update

from heedful_store import sequence
from heedful_store.errors import AlreadyExists, Invalid, LeaseLost, NotFound
from heedful_store.records import Scope
from heedful_store.registry_schema import run_inputs, runs

RunKind = Literal["refresh", "rebuild"]
RunStatus = Literal["queued", "running", "paused", "failed", "stopped", "finished"]
Control = Literal["", "pause", "stop"]
Split = Literal["train", "validation", "calibration", "gate", "excluded"]

_UNFINISHED = ("queued", "running", "paused")
_JSON_COLUMNS = ("config", "seeds", "progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One refresh and where it stands."""

    run_id: str  # UUIDv7
    scope: Scope  # owner
    kind: RunKind = "refresh"  # "rebuild" replaces a tainted version
    method: str = "auto"  # "auto" until the data has decided
    stage: str = "snapshot"  # snapshot, reward, policy, gate, publish, done
    status: RunStatus = "queued"  # who may work on it
    dataset_id: str | None = None  # content hash of the snapshot
    from_log_seq: int | None = None  # cursor before the first event read
    to_log_seq: int | None = None  # cursor of the last event read
    start_version: str | None = None  # what it starts from; None: the base
    policy_version: str | None = None  # what it published
    config: Mapping[str, object] = field(default_factory=dict)  # overrides, then all settings
    seeds: Mapping[str, object] = field(default_factory=dict)  # by purpose
    code_version: str = ""  # of the trainer
    evidence: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # by stage
    progress: Mapping[str, object] = field(default_factory=dict)  # {"fraction", "figures"}
    control: Control = ""  # what its worker is asked to do at its next step
    verdict: str = ""  # the gate's
    failure: str | None = None  # what went wrong
    lease_owner: str | None = None  # process that works on it
    lease_until_ms: int | None = None  # then anybody may take it
    created_at_ms: int = 0  # set by the store
    finished_at_ms: int | None = None  # set by the store with the last status
    tainted_at_ms: int | None = None  # an input was erased


@dataclass(frozen=True, slots=True)
class RunInput:
    """One event that a run read, and what for."""

    feedback_seq: int  # place in the log
    split: Split  # what it was used for
    reason: str | None = None  # why it was excluded


class RunChanges(TypedDict, total=False):
    """What the holder of the lease may change."""

    stage: str
    status: RunStatus
    evidence: Mapping[str, Mapping[str, object]]  # merged by stage
    progress: Mapping[str, object]
    dataset_id: str
    from_log_seq: int
    to_log_seq: int
    start_version: str
    policy_version: str
    method: str
    config: Mapping[str, object]
    seeds: Mapping[str, object]
    code_version: str
    verdict: str
    failure: str
    finished_at_ms: int


def create(connection: Connection, run: Run, at_ms: int) -> Run:
    """Store a run; raise AlreadyExists while another one of the project is not finished."""
    sequence.lock_registry(connection)
    query = select(runs.c.run_id).where(_within(run.scope), runs.c.status.in_(_UNFINISHED))
    if (other := connection.execute(query).scalar()) is not None:
        raise AlreadyExists(f"run {other} of this project is not finished")
    values = {column.name: getattr(run, column.name, None) for column in runs.columns}
    values |= {"tenant": run.scope.tenant, "project": run.scope.project}
    values |= {"created_at_ms": run.created_at_ms or at_ms}
    values |= {name: json.dumps(values[name], sort_keys=True) for name in _JSON_COLUMNS}
    values["evidence"] = json.dumps(run.evidence, sort_keys=True)
    connection.execute(insert(runs).values(values))
    return get(connection, run.scope, run.run_id)


def get(connection: Connection, scope: Scope, run_id: str) -> Run:
    """Return a run; raise NotFound, also for a foreign one."""
    row = connection.execute(select(runs).where(_within(scope), runs.c.run_id == run_id)).first()
    if row is None:
        raise NotFound(f"run {run_id}")
    return _from_row(row)


def find(connection: Connection, scope: Scope | None, limit: int = 20) -> list[Run]:
    """Return the runs of a project, or of all, newest first."""
    query = select(runs).order_by(runs.c.created_at_ms.desc(), runs.c.run_id.desc()).limit(limit)
    if scope is not None:
        query = query.where(_within(scope))
    return [_from_row(row) for row in connection.execute(query)]


def inputs(connection: Connection, run_id: str) -> list[RunInput]:
    """Return what a run read, in order of the log."""
    query = select(run_inputs).where(run_inputs.c.run_id == run_id)
    rows = connection.execute(query.order_by(run_inputs.c.feedback_seq))
    return [RunInput(row.feedback_seq, row.split, row.reason) for row in rows]


def lease(
    connection: Connection, owner: str, lease_ms: int, at_ms: int, scope: Scope | None = None
) -> Run | None:
    """Give the oldest run that nobody works on to ``owner``, or None where there is none.

    That is a queued one, or one whose worker let its lease lapse; not one that is to pause.
    """
    _check_lease(owner, lease_ms)
    sequence.lock_registry(connection)
    lapsed = func.coalesce(runs.c.lease_until_ms, 0) <= at_ms
    condition = and_(
        runs.c.control != "pause",
        or_(
            runs.c.status == "queued",
            and_(runs.c.status.in_(["running", "paused"]), lapsed),
        ),
    )
    if scope is not None:
        condition = and_(condition, _within(scope))
    oldest = select(runs.c.run_id).where(condition).order_by(runs.c.created_at_ms, runs.c.run_id)
    run_id = connection.execute(oldest.limit(1)).scalar()
    if run_id is None:
        return None
    values = {"status": "running", "lease_owner": owner, "lease_until_ms": at_ms + lease_ms}
    return _changed(connection, run_id, values)


def renew(connection: Connection, run_id: str, owner: str, lease_ms: int, at_ms: int) -> Run:
    """Lengthen a lease, also one that lapsed and was not taken; raise LeaseLost."""
    _check_lease(owner, lease_ms)
    _held(connection, run_id, owner)
    return _changed(connection, run_id, {"lease_until_ms": at_ms + lease_ms})


def change(connection: Connection, run_id: str, owner: str, changes: RunChanges, at_ms: int) -> Run:
    """Change a run that ``owner`` holds, and free it with its last status; raise LeaseLost."""
    held = _held(connection, run_id, owner)
    values: dict[str, Any] = dict(changes)
    for name in _JSON_COLUMNS:
        if name in values:
            values[name] = json.dumps(values[name], sort_keys=True)
    if "evidence" in changes:
        merged = {**held.evidence, **changes["evidence"]}
        values["evidence"] = json.dumps(merged, sort_keys=True)
    status = changes.get("status")
    if status is not None and status not in _UNFINISHED:
        values.setdefault("finished_at_ms", at_ms)
    if status is not None and status not in ("running", "paused"):
        values |= {"lease_owner": None, "lease_until_ms": None, "control": ""}
    return _changed(connection, run_id, values)


def control(connection: Connection, scope: Scope, run_id: str, wanted: Control, at_ms: int) -> Run:
    """Ask a run to pause, to stop or, with "", to go on; raise NotFound, Invalid once it ended.

    Its worker does so at its next step; where nobody works on it, that is done here.
    """
    sequence.lock_registry(connection)
    run = get(connection, scope, run_id)
    if run.status not in _UNFINISHED:
        raise Invalid("run_id", f"the run has ended: {run.status}")
    values: dict[str, Any] = {"control": wanted}
    if run.lease_owner is None or (run.lease_until_ms or 0) <= at_ms:
        values |= {"lease_owner": None, "lease_until_ms": None}
        values |= _without_worker(wanted, at_ms)
    return _changed(connection, run_id, values)


def put_inputs(connection: Connection, run_id: str, owner: str, rows: Sequence[RunInput]) -> int:
    """Record exactly which events a run read, instead of what was recorded; raise LeaseLost."""
    _held(connection, run_id, owner)
    connection.execute(delete(run_inputs).where(run_inputs.c.run_id == run_id))
    values = [
        {"run_id": run_id, "feedback_seq": r.feedback_seq, "split": r.split, "reason": r.reason}
        for r in rows
    ]
    if values:
        connection.execute(insert(run_inputs), values)
    return len(values)


def _without_worker(wanted: Control, at_ms: int) -> dict[str, Any]:
    if wanted == "stop":
        return {"status": "stopped", "control": "", "finished_at_ms": at_ms}
    return {"status": "paused" if wanted == "pause" else "queued"}


def _held(connection: Connection, run_id: str, owner: str) -> Run:
    sequence.lock_registry(connection)
    row = connection.execute(select(runs).where(runs.c.run_id == run_id)).first()
    if row is None:
        raise NotFound(f"run {run_id}")
    run = _from_row(row)
    if run.lease_owner != owner:
        raise LeaseLost(f"run {run_id} is {run.status}, held by {run.lease_owner or 'nobody'}")
    return run


def _changed(connection: Connection, run_id: str, values: Mapping[str, Any]) -> Run:
    if values:
        connection.execute(update(runs).where(runs.c.run_id == run_id).values(**values))
    return _from_row(connection.execute(select(runs).where(runs.c.run_id == run_id)).one())


def _check_lease(owner: str, lease_ms: int) -> None:
    if not owner:
        raise Invalid("owner", "must not be empty")
    if lease_ms <= 0:
        raise Invalid("lease_ms", "must be positive")


def _within(scope: Scope) -> Any:
    return and_(runs.c.tenant == scope.tenant, runs.c.project == scope.project)


def _from_row(row: Row[Any]) -> Run:
    fields = dict(row._mapping)
    scope = Scope(fields.pop("tenant"), fields.pop("project"))
    for name in (*_JSON_COLUMNS, "evidence"):
        fields[name] = json.loads(fields[name])
    return Run(scope=scope, **fields)

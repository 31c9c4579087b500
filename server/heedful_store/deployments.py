"""Which version answers: aliases, and the append-only log of how they came to point there.

Owns the tables of aliases and deployments, and what a move does to the states of the versions. It
does not decide whether a version may be promoted; the server does. Every move is one transaction
under the registry's lock. Writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, delete, func, insert, select, update

from heedful_store import sequence
from heedful_store.errors import AliasMoved, NotFound
from heedful_store.records import Scope
from heedful_store.registry_schema import aliases, deployments, policies

Alias = Literal["champion", "challenger"]
Action = Literal["publish", "canary", "promote", "reject", "roll_back"]

_BASE = "base"
# What becomes of the version that an alias leaves, by what was done.
_LEFT_BEHIND = {
    ("champion", "promote"): "retired",
    ("champion", "roll_back"): "rejected",
    ("challenger", "canary"): "candidate",
    ("challenger", "reject"): "rejected",
    ("challenger", "roll_back"): "rejected",
}


@dataclass(frozen=True, slots=True)
class AnyVersion:
    """An alias may point anywhere before a move."""


ANY = AnyVersion()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One entry of the log."""

    scope: Scope  # owner
    base_id: str  # aliases are per base
    action: Action  # what was done
    to_version: str  # to this version; empty: the alias went away
    deployment_id: int = 0  # place in the log, set by the store
    alias: str = ""  # the alias that moved; empty: none did
    from_version: str | None = None  # from this version
    actor: str = ""  # key, user, run or "probation"
    approved: bool = False  # by a person, without proof
    verdict: str = ""  # "proven", "approved", "rolled back" or the gate's
    reason: str = ""  # for people
    evidence: Mapping[str, object] = field(default_factory=dict)  # what it rests on
    at_ms: int = 0  # server clock


def move(
    connection: Connection, wanted: Deployment, expected: str | AnyVersion | None = ANY
) -> Deployment:
    """Point ``wanted.alias`` at ``wanted.to_version`` ("" takes it away) and log it.

    Raises NotFound for an unknown version, AliasMoved where the alias is not at ``expected``.
    """
    sequence.lock_registry(connection)
    scope, base_id = wanted.scope, wanted.base_id
    before = current(connection, scope, base_id).get(wanted.alias)
    if not isinstance(expected, AnyVersion) and _name(expected) != _name(before):
        raise AliasMoved(f"{wanted.alias} is at {_name(before)}, not at {_name(expected)}")
    _point(connection, wanted)
    if before and before != wanted.to_version:
        left = _LEFT_BEHIND.get((wanted.alias, wanted.action), "candidate")
        _set_state(connection, scope, before, left)
    if wanted.to_version not in ("", _BASE):
        _set_state(connection, scope, wanted.to_version, wanted.alias)
    if wanted.alias == "champion":
        # A challenger that became champion has nobody left to challenge.
        _drop(connection, wanted, "challenger", wanted.to_version)
    default = _BASE if wanted.alias == "champion" else ""
    return append(
        connection,
        replace(wanted, from_version=before or default, to_version=wanted.to_version or default),
    )


def append(connection: Connection, deployment: Deployment) -> Deployment:
    """Log a deployment that moves no alias, or one that ``move`` has carried out.

    A version is published once: a second such entry is the first one.
    """
    last = sequence.lock_registry(connection)
    if deployment.action == "publish":
        query = select(deployments).where(
            _within(deployments, deployment.scope),
            deployments.c.action == "publish",
            deployments.c.version == deployment.to_version,
        )
        if (row := connection.execute(query).first()) is not None:
            return _from_row(row)
    stored = replace(deployment, deployment_id=last + 1)
    connection.execute(insert(deployments).values(_to_row(stored)))
    sequence.advance_deployments(connection, last + 1)
    return stored


def current(connection: Connection, scope: Scope, base_id: str) -> dict[str, str]:
    """Return where the aliases of a project point; an alias that is missing points at the base."""
    query = select(aliases.c.alias, aliases.c.version).where(
        _within(aliases, scope), aliases.c.base_id == base_id
    )
    return {row.alias: row.version for row in connection.execute(query)}


def all_aliases(connection: Connection, base_id: str) -> dict[Scope, dict[str, str]]:
    """Return where the aliases of every project point."""
    found: dict[Scope, dict[str, str]] = {}
    query = select(aliases).where(aliases.c.base_id == base_id)
    for row in connection.execute(query):
        found.setdefault(Scope(row.tenant, row.project), {})[row.alias] = row.version
    return found


def find(
    connection: Connection, scope: Scope, after_id: int = 0, limit: int = 100
) -> list[Deployment]:
    """Return a page of a project's log, oldest first."""
    query = (
        select(deployments)
        .where(_within(deployments, scope), deployments.c.deployment_id > after_id)
        .order_by(deployments.c.deployment_id)
        .limit(limit)
    )
    return [_from_row(row) for row in connection.execute(query)]


def last_move(
    connection: Connection, scope: Scope, base_id: str, alias: Alias
) -> Deployment | None:
    """Return the newest move of an alias, or None where it never moved."""
    row = connection.execute(_moves(scope, base_id, alias).limit(1)).first()
    return None if row is None else _from_row(row)


def last_id(connection: Connection) -> int:
    """Return the id of the newest deployment of all projects; 0 where there is none."""
    last: int | None = connection.execute(select(func.max(deployments.c.deployment_id))).scalar()
    return last or 0


def change_mark(connection: Connection) -> tuple[int, int]:
    """Return two numbers that change whenever a deployment is logged or a policy is tainted."""
    tainted = connection.execute(select(func.count(policies.c.tainted_at_ms))).scalar_one()
    return last_id(connection), tainted


def champion_before(connection: Connection, scope: Scope, base_id: str) -> str:
    """Return what a roll-back goes to: the newest earlier champion that is sound, else "base"."""
    now = current(connection, scope, base_id).get("champion", _BASE)
    sound = select(policies.c.version).where(
        _within(policies, scope),
        policies.c.base_id == base_id,
        policies.c.state.not_in(["rejected", "failed"]),
        policies.c.tainted_at_ms.is_(None),
    )
    allowed = {_BASE, *connection.scalars(sound)} - {now}
    for row in connection.execute(_moves(scope, base_id, "champion")):
        for version in (row.version, row.previous_version):
            if version in allowed:
                return str(version)
    return _BASE


def _moves(scope: Scope, base_id: str, alias: str) -> Any:
    return (
        select(deployments)
        .where(
            _within(deployments, scope),
            deployments.c.base_id == base_id,
            deployments.c.alias == alias,
        )
        .order_by(deployments.c.deployment_id.desc())
    )


def _point(connection: Connection, wanted: Deployment) -> None:
    if wanted.to_version in ("", _BASE):
        _drop(connection, wanted, wanted.alias, None)
        return
    values = {"version": wanted.to_version, "moved_at_ms": wanted.at_ms}
    mine = _mine(wanted, wanted.alias)
    if not connection.execute(update(aliases).where(mine).values(values)).rowcount:
        key = {"tenant": wanted.scope.tenant, "project": wanted.scope.project}
        key |= {"base_id": wanted.base_id, "alias": wanted.alias}
        connection.execute(insert(aliases).values(key | values))


def _drop(connection: Connection, wanted: Deployment, alias: str, version: str | None) -> None:
    """Take an alias away; with a version, only if it points there."""
    condition = _mine(wanted, alias)
    if version is not None:
        condition = and_(condition, aliases.c.version == version)
    connection.execute(delete(aliases).where(condition))


def _mine(wanted: Deployment, alias: str) -> Any:
    return and_(
        _within(aliases, wanted.scope),
        aliases.c.base_id == wanted.base_id,
        aliases.c.alias == alias,
    )


def _set_state(connection: Connection, scope: Scope, version: str, state: str) -> None:
    change = update(policies).where(_within(policies, scope), policies.c.version == version)
    if not connection.execute(change.values(state=state)).rowcount and version != _BASE:
        raise NotFound(f"version {version}")


def _name(version: str | None) -> str:
    return version or _BASE


def _within(table: Any, scope: Scope) -> Any:
    return and_(table.c.tenant == scope.tenant, table.c.project == scope.project)


def _to_row(deployment: Deployment) -> dict[str, Any]:
    return {
        "deployment_id": deployment.deployment_id,
        "tenant": deployment.scope.tenant,
        "project": deployment.scope.project,
        "action": deployment.action,
        "version": deployment.to_version,
        "previous_version": deployment.from_version,
        "actor": deployment.actor,
        "approved": deployment.approved,
        "evidence": json.dumps(deployment.evidence, sort_keys=True),
        "at_ms": deployment.at_ms,
        "base_id": deployment.base_id,
        "alias": deployment.alias,
        "verdict": deployment.verdict,
        "reason": deployment.reason,
    }


def _from_row(row: Row[Any]) -> Deployment:
    return Deployment(
        scope=Scope(row.tenant, row.project),
        base_id=row.base_id,
        action=row.action,
        to_version=row.version,
        deployment_id=row.deployment_id,
        alias=row.alias,
        from_version=row.previous_version,
        actor=row.actor,
        approved=row.approved,
        verdict=row.verdict,
        reason=row.reason,
        evidence=json.loads(row.evidence),
        at_ms=row.at_ms,
    )

"""Policy versions of a project: published once, their files never changed, their state moved.

Owns the table of policies: names, idempotent publishing, states and cards. Which version an alias
points at is ``deployments``' matter; what is in the files, ``adapter_files``'. Functions take a
connection: writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, insert, select, update

from heedful_store import deployments, sequence
from heedful_store.errors import AlreadyExists, Invalid, NotFound
from heedful_store.records import Scope
from heedful_store.registry_schema import policies

PolicyState = Literal["candidate", "challenger", "champion", "retired", "rejected", "failed"]
Role = Literal["policy", "reward", "value", "reference"]

BASE_VERSION = "base"  # every project's first version; no row, no files
_PREFIX: dict[str, str] = {"policy": "v", "reward": "r", "value": "val", "reference": "ref"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """One version: an adapter on a base model, and where it came from."""

    scope: Scope  # owner
    version: str  # "v3", "r2"; empty on publishing: the next free name
    content_hash: str  # of the adapter's files: the adapter's id in the engine
    base_id: str  # base model and tokenizer it belongs to
    template_hash: str = ""  # chat template
    role: Role = "policy"  # what it is
    path: str = ""  # its directory, below the home
    manifest: Mapping[str, object] = field(default_factory=dict)  # SHA-256 and size per file
    parent_version: str | None = None  # what it started from; None: the base
    inherits_lineage: bool = False  # the parent's data is in these weights
    run_id: str | None = None  # the run that made it
    state: PolicyState = "candidate"  # where it stands
    card: Mapping[str, object] = field(default_factory=dict)  # data counts and gate evidence
    created_at_ms: int = 0  # set by the store
    tainted_at_ms: int | None = None  # when words of an erased user were found in it
    method: str = ""  # how it was trained
    verdict: str = ""  # pass, fail, inconclusive; empty: not judged


def next_version(connection: Connection, scope: Scope, role: Role) -> str:
    """Return the next free name of a role: "v1", "v2", … or "r1", …"""
    prefix = _PREFIX[role]
    query = select(policies.c.version).where(_within(scope), policies.c.role == role)
    taken = [name.removeprefix(prefix) for name in connection.scalars(query)]
    return f"{prefix}{max((int(number) for number in taken if number.isdigit()), default=0) + 1}"


def publish(connection: Connection, policy: PolicyVersion, at_ms: int) -> PolicyVersion:
    """Store a version and its "publish" deployment; return the one that is there already.

    Raises AlreadyExists where the name is taken by other files.
    """
    sequence.lock_registry(connection)
    if known := _find_same(connection, policy):
        return known
    version = policy.version or next_version(connection, policy.scope, policy.role)
    if version == BASE_VERSION or _row(connection, policy.scope, version) is not None:
        raise AlreadyExists(f"version {version}")
    stored = replace(policy, version=version, created_at_ms=policy.created_at_ms or at_ms)
    connection.execute(insert(policies).values(_to_row(stored)))
    published = deployments.Deployment(
        scope=policy.scope,
        base_id=policy.base_id,
        action="publish",
        to_version=version,
        actor=policy.run_id or "",
        at_ms=at_ms,
    )
    deployments.append(connection, published)
    return stored


def get(connection: Connection, scope: Scope, version: str) -> PolicyVersion:
    """Return a version; raise NotFound for an unknown or foreign one, and for the base."""
    row = _row(connection, scope, version)
    if row is None:
        raise NotFound(f"version {version}")
    return _from_row(row)


def find(connection: Connection, scope: Scope | None) -> list[PolicyVersion]:
    """Return the versions of a project, or of all projects, newest first."""
    query = select(policies).order_by(policies.c.created_at_ms.desc(), policies.c.version.desc())
    if scope is not None:
        query = query.where(_within(scope))
    return [_from_row(row) for row in connection.execute(query)]


def set_state(
    connection: Connection,
    scope: Scope,
    version: str,
    state: PolicyState,
    card: Mapping[str, object] | None = None,
    verdict: str | None = None,
) -> PolicyVersion:
    """Change where a version stands and, if given, its card and verdict; raise NotFound."""
    values: dict[str, object] = {"state": state}
    if card is not None:
        values["card"] = json.dumps(card, sort_keys=True)
    if verdict is not None:
        values["verdict"] = verdict
    change = update(policies).where(_within(scope), policies.c.version == version)
    if not connection.execute(change.values(values)).rowcount:
        raise NotFound(f"version {version}")
    return get(connection, scope, version)


def check(policy: PolicyVersion) -> None:
    """Raise Invalid unless the version can be found again: hash, base and path are there."""
    if len(policy.content_hash) != 64 or set(policy.content_hash) - set("0123456789abcdef"):
        raise Invalid("content_hash", "must be a SHA-256 in hexadecimal")
    if not policy.base_id:
        raise Invalid("base_id", "must not be empty")
    if not policy.path or policy.path.startswith("/") or ".." in policy.path.split("/"):
        raise Invalid("path", "must be a directory below the home")


def _find_same(connection: Connection, policy: PolicyVersion) -> PolicyVersion | None:
    """Return what an earlier attempt to publish the same files stored."""
    query = select(policies).where(
        _within(policy.scope),
        policies.c.content_hash == policy.content_hash,
        policies.c.role == policy.role,
        # NULL equals nothing in SQL; without a run the files alone say that it is the same.
        policies.c.run_id.is_(None)
        if policy.run_id is None
        else policies.c.run_id == policy.run_id,
    )
    row = connection.execute(query).first()
    return None if row is None else _from_row(row)


def _row(connection: Connection, scope: Scope, version: str) -> Row[Any] | None:
    query = select(policies).where(_within(scope), policies.c.version == version)
    return connection.execute(query).first()


def _within(scope: Scope) -> Any:
    return and_(policies.c.tenant == scope.tenant, policies.c.project == scope.project)


def _to_row(policy: PolicyVersion) -> dict[str, Any]:
    return {
        "tenant": policy.scope.tenant,
        "project": policy.scope.project,
        "version": policy.version,
        "content_hash": policy.content_hash,
        "base_id": policy.base_id,
        "template_hash": policy.template_hash,
        "role": policy.role,
        "path": policy.path,
        "manifest": json.dumps(policy.manifest, sort_keys=True),
        "parent_version": policy.parent_version,
        "inherits_lineage": policy.inherits_lineage,
        "run_id": policy.run_id,
        "state": policy.state,
        "card": json.dumps(policy.card, sort_keys=True),
        "created_at_ms": policy.created_at_ms,
        "tainted_at_ms": policy.tainted_at_ms,
        "method": policy.method,
        "verdict": policy.verdict,
    }


def _from_row(row: Row[Any]) -> PolicyVersion:
    return PolicyVersion(
        scope=Scope(row.tenant, row.project),
        version=row.version,
        content_hash=row.content_hash,
        base_id=row.base_id,
        template_hash=row.template_hash,
        role=row.role,
        path=row.path,
        manifest=json.loads(row.manifest),
        parent_version=row.parent_version,
        inherits_lineage=row.inherits_lineage,
        run_id=row.run_id,
        state=row.state,
        card=json.loads(row.card),
        created_at_ms=row.created_at_ms,
        tainted_at_ms=row.tainted_at_ms,
        method=row.method,
        verdict=row.verdict,
    )

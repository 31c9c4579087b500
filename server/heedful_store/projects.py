"""Projects: the apps of a tenant, each with its own log and settings.

Owns the table of projects. Settings are JSON that the server interprets. Writes run in the
writer's thread, reads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from heedful_store.eligibility import Profile
from heedful_store.errors import NotFound
from heedful_store.ids import now_ms
from heedful_store.records import Scope
from heedful_store.schema import projects


@dataclass(frozen=True, slots=True)
class Project:
    """One app of one tenant."""

    scope: Scope  # its name
    profile: Profile = "personal"  # who its raters are
    retention_days: int | None = None  # content of unrated answers; None keeps it
    settings: Mapping[str, object] = field(default_factory=dict)  # the server's
    created_at_ms: int = 0  # set by the store


def put(connection: Connection, project: Project) -> None:
    """Create a project or replace its settings."""
    mine = (
        projects.c.tenant == project.scope.tenant,
        projects.c.project == project.scope.project,
    )
    values = {
        "profile": project.profile,
        "retention_days": project.retention_days,
        "settings": json.dumps(project.settings, sort_keys=True),
    }
    if connection.execute(update(projects).where(*mine).values(values)).rowcount:
        return
    connection.execute(
        insert(projects).values(
            tenant=project.scope.tenant,
            project=project.scope.project,
            created_at_ms=now_ms(),
            **values,
        )
    )


def get(connection: Connection, scope: Scope) -> Project:
    """Return a project; raise NotFound."""
    query = select(projects).where(
        projects.c.tenant == scope.tenant, projects.c.project == scope.project
    )
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"project {scope.tenant}/{scope.project}")
    return _from_row(row)


def find(connection: Connection, tenant: str | None = None) -> list[Project]:
    """Return the projects of a tenant, or all, by name."""
    query = select(projects).order_by(projects.c.tenant, projects.c.project)
    if tenant is not None:
        query = query.where(projects.c.tenant == tenant)
    return [_from_row(row) for row in connection.execute(query)]


def _from_row(row: Row[Any]) -> Project:
    return Project(
        scope=Scope(row.tenant, row.project),
        profile=row.profile,
        retention_days=row.retention_days,
        settings=json.loads(row.settings),
        created_at_ms=row.created_at_ms,
    )

"""`heedful-server migrate-base`: which projects are carried to a new base, and what is printed.

Owns what the command reads and how its report looks; `migrating.py` owns the migration. The command
opens the store itself, also while a server has it open. Runs in the process of the command.
"""

import dataclasses
import json
from collections.abc import Sequence

from heedful_store import Scope, Store, StoreError
from heedful_store.schema import feedback
from sqlalchemy import select

from heedful_server.config import ServerConfig
from heedful_server.errors import StartupError
from heedful_server.feedback.migrating import Migrated, NewBase, migrate
from heedful_server.feedback.opening import open_store


def run(
    config: ServerConfig, base: NewBase, tenant: str, project: str | None, dry_run: bool
) -> list[Migrated]:
    """Carry the feedback of one project, or of all of the tenant, to a base.

    Raises:
        StartupError: the store cannot be opened, read or written.
    """
    with open_store(config) as store:
        try:
            projects = [project] if project is not None else _projects(store, tenant)
            return [
                migrate(store, Scope(tenant, name), config.profile, base, dry_run=dry_run)
                for name in projects
            ]
        except StoreError as error:
            raise StartupError(f"the migration stopped, run it again: {error}") from None


def text(reports: Sequence[Migrated], base_id: str, dry_run: bool, as_json: bool) -> str:
    """Return what the command prints."""
    if as_json:
        projects = [dataclasses.asdict(report) for report in reports]
        return json.dumps({"base_id": base_id, "dry_run": dry_run, "projects": projects}, indent=2)
    if not reports:
        return "there is no feedback to carry"
    verb = "would be copied" if dry_run else "copied"
    lines = []
    for report in reports:
        counts = [f"{report.copied} {verb}"]
        counts += [f"{report.known} there before"] if report.known else []
        counts += [f"{report.taken_back} taken back"] if report.taken_back else []
        counts += [f"{count} left: {reason}" for reason, count in sorted(report.skipped.items())]
        lines.append(f"{report.project}: {', '.join(counts)}")
    return "\n".join([*lines, f"base: {base_id}"])


def _projects(store: Store, tenant: str) -> list[str]:
    names = select(feedback.c.project).where(feedback.c.tenant == tenant).distinct()
    with store.read() as connection:
        return sorted(connection.execute(names).scalars())

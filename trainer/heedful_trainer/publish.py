"""Making a version of an adapter: its files under their name, then its row in the registry.

Owns the order (copy, flush, rename, row) and that it can be done again after a kill: the row is
found by run and content, a directory without a row is a leftover. It decides nothing about whether
a version may serve. One thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful_store import (
    AlreadyExists,
    PolicyState,
    PolicyVersion,
    Role,
    Run,
    Store,
    adapter_files,
)


@dataclass(frozen=True, slots=True)
class Publication:
    """What is said about a version."""

    role: Role
    state: PolicyState
    method: str
    verdict: str
    card: Mapping[str, Any]


def publish_adapter(
    store: Store, home: Path, run: Run, directory: Path, publication: Publication
) -> PolicyVersion:
    """Publish a run's sealed adapter and return its version; the same one if done before.

    Raises:
        AdapterDamaged: the directory is not what was sealed.
    """
    manifest = adapter_files.verify(directory)
    for known in store.find_policies(run.scope):
        same = (known.run_id, known.content_hash) == (run.run_id, manifest.content_hash)
        if same and known.role == publication.role:
            return known
    version = store.next_version(run.scope, publication.role)
    relative = Path("policies") / run.scope.tenant / run.scope.project / version
    _place(directory, home / relative)
    row = PolicyVersion(
        scope=run.scope,
        version=version,
        content_hash=manifest.content_hash,
        base_id=manifest.info.base_id,
        template_hash=manifest.info.template_hash,
        role=publication.role,
        path=str(relative),
        manifest=dict(manifest.files),
        parent_version=run.start_version,
        run_id=run.run_id,
        state=publication.state,
        card=publication.card,
        method=publication.method,
        verdict=publication.verdict,
    )
    return store.publish_policy(row).result()


def _place(directory: Path, final: Path) -> None:
    temp = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    shutil.copytree(directory, temp)
    adapter_files.seal(temp)
    try:
        adapter_files.publish(temp, final)
    except AlreadyExists:
        # No row has this name, so this is what a killed run left; the project's one running run
        # is ours.
        shutil.rmtree(final)
        adapter_files.publish(temp, final)

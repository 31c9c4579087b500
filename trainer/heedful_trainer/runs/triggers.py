"""When a project is trained by itself: enough new feedback, or a champion that must be replaced.

Owns the rules. A rebuild comes before a refresh, and a project with an unfinished run is left
alone. Main thread of the watcher.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import structlog
from heedful_store import (
    AlreadyExists,
    Profile,
    Run,
    RunKind,
    Scope,
    Store,
    now_ms,
    uuid7,
)

from heedful_trainer.config import WatchSettings


class Triggers:
    """Looks at every project now and then and queues the runs that are due."""

    def __init__(self, store: Store, settings: WatchSettings, profile: Profile) -> None:
        self._store, self._settings, self._profile = store, settings, profile
        self._looked_at_s = -settings.poll_s

    def look(self) -> list[Run]:
        """Queue what is due and return it; does nothing until the next poll is due."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s < self._settings.poll_s:
            return []
        self._looked_at_s = now_s
        return [run for scope in self._scopes() if (run := self._look_at(scope)) is not None]

    def _scopes(self) -> Iterator[Scope]:
        """Yield every project that has a version, a run or a row of its own."""
        found = {Scope("local", "default"), Scope()}
        found |= {run.scope for run in self._store.find_runs(None, limit=1000)}
        found |= {policy.scope for policy in self._store.find_policies(None)}
        found |= {project.scope for project in self._store.list_projects()}
        yield from sorted(found, key=lambda scope: (scope.tenant, scope.project))

    def _look_at(self, scope: Scope) -> Run | None:
        runs = self._store.find_runs(scope, limit=100)
        if any(run.status in ("queued", "running", "paused") for run in runs):
            return None
        if self._settings.rebuild and self._must_rebuild(scope, runs):
            return self._queue(scope, "rebuild")
        if self._is_due(scope, runs):
            return self._queue(scope, "refresh")
        return None

    def _must_rebuild(self, scope: Scope, runs: list[Run]) -> bool:
        tainted = [
            policy.tainted_at_ms
            for policy in self._store.find_policies(scope)
            if policy.state == "champion" and policy.tainted_at_ms is not None
        ]
        # A rebuild that failed is not tried again by itself: somebody must look.
        since = max((run.created_at_ms for run in runs if run.kind == "rebuild"), default=0)
        return any(at_ms > since for at_ms in tainted)

    def _is_due(self, scope: Scope, runs: list[Run]) -> bool:
        last = max(runs, key=lambda run: run.created_at_ms, default=None)
        cursor = max((run.to_log_seq or 0 for run in runs), default=0)
        waited_s = (now_ms() - last.created_at_ms) / 1000 if last is not None else None
        settings = self._settings
        if waited_s is not None and waited_s < settings.min_interval_s:
            return False
        new = self._store.backlog(scope, cursor)
        if not new:
            return False
        if settings.max_wait_s and waited_s is not None and waited_s >= settings.max_wait_s:
            return True
        if new < settings.min_events:
            return False
        return self._count_raters(scope, cursor) >= settings.min_raters

    def _count_raters(self, scope: Scope, cursor: int) -> int:
        """Count the different people behind what is new and may be learned from."""
        if self._settings.min_raters <= 1:
            return 1
        raters = set()
        for judged in self._store.judged_feedback(scope, self._profile):
            stored = judged.feedback
            is_new = (stored.log_seq or stored.seq) > cursor
            if is_new and judged.fate.trainable and stored.event is not None:
                raters.add(stored.event.rater_id)
        return len(raters)

    def _queue(self, scope: Scope, kind: RunKind) -> Run | None:
        run = Run(run_id=uuid7(), scope=scope, kind=kind)
        try:
            created = self._store.create_run(run).result()
        except AlreadyExists:
            # Somebody started one in the same moment.
            return None
        structlog.get_logger().info(
            "run_queued", run_id=created.run_id, kind=kind, project=scope.project
        )
        return created

"""Refresh runs as callers see them: started, read, followed, controlled.

Owns the rows that a request makes and the pace at which a run is looked at; what a run does is the
trainer's. Event loop; the store is read in threads.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

from heedful_store import Control, Run, Scope, Store, uuid7

from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.errors import Draining
from heedful_server.readiness import Readiness

POLL_S = 0.3
_ENDED = ("failed", "stopped", "finished")


class Refreshes:
    """The refresh runs of all projects."""

    def __init__(self, store: Store, directory: PolicyDirectory, readiness: Readiness) -> None:
        self._store = store
        self._directory = directory
        self._readiness = readiness

    async def start(self, scope: Scope, method: str, overrides: Mapping[str, str]) -> Run:
        """Queue a run; it is a rebuild where the champion learned from data that was erased.

        Raises AlreadyExists while another run of the project is not finished.
        """
        champion = self._directory.policy(scope, self._directory.champion(scope))
        is_tainted = champion is not None and champion.tainted_at_ms is not None
        run = Run(
            run_id=uuid7(),
            scope=scope,
            kind="rebuild" if is_tainted else "refresh",
            method=method,
            config=dict(overrides),
        )
        return await self._store.create_run(run)

    async def get(self, scope: Scope, run_id: str) -> Run:
        """Return a run; raises NotFound."""
        return await asyncio.to_thread(self._store.get_run, scope, run_id)

    async def find(self, scope: Scope, limit: int) -> list[Run]:
        """Return the runs of a project, newest first."""
        return await asyncio.to_thread(self._store.find_runs, scope, limit)

    async def control(self, scope: Scope, run_id: str, control: Control) -> Run:
        """Ask a run to pause, to go on or to stop; raises NotFound, Invalid once it ended."""
        return await self._store.control_run(scope, run_id, control)

    async def watch(self, scope: Scope, run_id: str) -> AsyncIterator[Run]:
        """Yield a run now and whenever it has changed, until it ends; raises NotFound, Draining."""
        seen: Run | None = None
        while True:
            run = await self.get(scope, run_id)
            if _visible(run) != _visible(seen):
                yield run
            if run.status in _ENDED:
                return
            seen = run
            await asyncio.sleep(POLL_S)
            if self._readiness.draining:
                raise Draining("the server is shutting down; the run goes on")


def _visible(run: Run | None) -> object:
    """Return what callers see of a run: a renewed lease is no news."""
    if run is None:
        return None
    return (
        run.stage,
        run.status,
        run.progress,
        run.evidence,
        run.method,
        run.verdict,
        run.policy_version,
        run.failure,
    )

"""The upkeep of the log while the server runs: retention, waiting events, disk space, figures.

Owns what is done how often. A store that cannot do it now is asked again at the next turn. One task
on the event loop; the store is read in worker threads and written in its own.
"""

import asyncio
import shutil
from pathlib import Path

import structlog
from heedful_store import Scope, Store, StoreError, now_ms

from heedful_server.errors import StartupError
from heedful_server.feedback import queries
from heedful_server.feedback.completion_log import CompletionLog
from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.feedback.tokens import Tokens

log = structlog.get_logger(__name__)

_DAY_MS = 86_400_000
_DISK_INTERVAL_S = 5.0
# The disk is looked at in each turn, everything else in each twelfth: once a minute.
_TURNS = 12


class Upkeep:
    """Keeps one store in order."""

    def __init__(
        self,
        store: Store,
        tokens: Tokens,
        completion_log: CompletionLog,
        metrics: FeedbackMetrics,
        *,
        retention_days: int,
        watermark_bytes: int,
        disk: Path | None,
    ) -> None:
        """Args are as in the configuration; `disk` is where the store lies, None if elsewhere."""
        self._store = store
        self._tokens = tokens
        self._log = completion_log
        self._metrics = metrics
        self._retention_days = retention_days
        self._watermark_bytes = watermark_bytes
        self._disk = disk

    async def run(self) -> None:
        """Work until cancelled."""
        turn = 0
        while True:
            try:
                self.check_disk()
                if turn % _TURNS == 0:
                    await self.tidy()
            except Exception:
                # A defect here must not end retention for good without a word.
                log.exception("upkeep of the feedback log failed")
            turn += 1
            await asyncio.sleep(_DISK_INTERVAL_S)

    def check_disk(self) -> None:
        """Stop logging answers while space is short, so that feedback still finds room."""
        if self._disk is None:
            return
        try:
            free_bytes = shutil.disk_usage(self._disk).free
        except OSError as error:
            log.warning("cannot look at the disk of the store", error=str(error))
            return
        self._metrics.free_bytes.set(free_bytes)
        is_low = free_bytes < self._watermark_bytes
        if is_low != self._log.disk_is_low:
            state = "answers are not logged" if is_low else "answers are logged again"
            log.warning(f"disk space: {state}", free_bytes=free_bytes)
        self._log.disk_is_low = is_low

    async def tidy(self) -> None:
        """Give up events whose answer never came, remove old content, refresh figures and keys."""
        try:
            self._tokens.refresh()
            await self._store.sweep_pending()
            await self._prune()
            await asyncio.to_thread(self._count)
        except (StoreError, StartupError) as error:
            log.warning("upkeep of the feedback log was put off", reason=str(error))

    async def _prune(self) -> None:
        if self._retention_days == 0:
            return
        older_than_ms = now_ms() - self._retention_days * _DAY_MS
        for scope in await asyncio.to_thread(self._scopes):
            more = True
            while more:
                report = await self._store.prune(scope, older_than_ms)
                self._metrics.pruned.inc(report.payloads_removed)
                more = report.more

    def _scopes(self) -> list[Scope]:
        with self._store.read() as connection:
            return queries.scopes(connection)

    def _count(self) -> None:
        with self._store.read() as connection:
            counts = queries.event_counts(connection)
            found = queries.scopes(connection)
            cursors = [(scope, queries.trained_cursor(connection, scope)) for scope in found]
        self._metrics.set_states(counts)
        self._metrics.backlog.set(sum(self._store.backlog(*place) for place in cursors))

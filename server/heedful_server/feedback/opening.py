"""Opens the log of feedback and puts its parts together.

Owns the order: keys, store, then what works on them; and that a store which cannot be opened is an
error of the start, in words that name the setting. Called once at start and once at the end, on
the event loop before and after it serves.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from heedful_store import Consent, DatabaseOptions, SchemaMismatch, Store, StoreError
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from heedful_server.config import ServerConfig
from heedful_server.errors import StartupError
from heedful_server.feedback import token_keys
from heedful_server.feedback.completion_log import CompletionLog, LogSettings
from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.feedback.recent import RecentAnswers
from heedful_server.feedback.tokens import Tokens
from heedful_server.feedback.upkeep import Upkeep


@dataclass(frozen=True, slots=True)
class FeedbackParts:
    """What the rest of the server uses of the feedback log."""

    store: Store
    tokens: Tokens
    recent: RecentAnswers
    log: CompletionLog
    upkeep: Upkeep
    settings: LogSettings

    async def close(self) -> None:
        """Write what waits and close the store."""
        await self.log.drain()
        await asyncio.to_thread(self.store.close)


def open_feedback(
    config: ServerConfig, base_id: str, template_hash: str, metrics: FeedbackMetrics
) -> FeedbackParts:
    """Open the keys and the store of a configuration; raises StartupError.

    Args:
        config: the configuration.
        base_id: names base model and tokenizer, for the rows of answers.
        template_hash: of the chat template, for the same.
        metrics: what the store reports to.
    """
    tokens = Tokens(config.home_dir / token_keys.FILE_NAME, config.feedback.token_days)
    store = open_store(config, metrics)
    metrics.watch_store(lambda: store.queued_items, lambda: store.death is None)
    recent = RecentAnswers()
    settings = LogSettings(
        consent=Consent(log=config.consent_log, train=config.consent_train),
        timeout_s=config.feedback.log_timeout_s,
        base_id=base_id,
        template_hash=template_hash,
    )
    log = CompletionLog(store, tokens, metrics, recent, settings)
    file = sqlite_file(config.store_url)
    upkeep = Upkeep(
        store,
        tokens,
        log,
        metrics,
        retention_days=config.feedback.retention_days,
        watermark_bytes=config.feedback.disk_watermark_bytes,
        disk=file.parent if file is not None else None,
    )
    return FeedbackParts(store, tokens, recent, log, upkeep, settings)


def open_store(config: ServerConfig, metrics: FeedbackMetrics | None = None) -> Store:
    """Open the store of a configuration, migrating it first; raises StartupError."""
    url = config.store_url
    try:
        if (file := sqlite_file(url)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        return Store(
            url,
            database=DatabaseOptions(min_free_bytes=config.feedback.reserve_bytes),
            observer=metrics.observe_group if metrics is not None else None,
        )
    except (SchemaMismatch, StoreError, SQLAlchemyError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StartupError(
            f"cannot open the store {_without_password(url)} (feedback.store_url): {reason}"
        ) from None


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL, None for another database; raises ValueError."""
    try:
        parsed = make_url(url)
    except SQLAlchemyError:
        raise ValueError("is not a URL such as sqlite:///FILE or postgresql://…") from None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database)


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "of the configuration"

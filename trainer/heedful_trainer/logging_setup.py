"""Sets up structured logging for the trainer, once, at its start.

Owns the format of log lines: readable on a terminal, one JSON object a line elsewhere, on standard
error. It knows nothing of what is logged.
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(level: str) -> None:
    """Log ``level`` ("debug", "info", "warning", "error") and above, for structlog and logging."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    renderers: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level_number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(level_number, logging.WARNING), stream=sys.stderr, force=True)

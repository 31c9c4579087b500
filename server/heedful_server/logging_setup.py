"""Sets up structured logging for a process, once, at its start.

Owns the format of log lines: readable on a terminal, one JSON object a line elsewhere. It knows
nothing of what is logged. Used by the entry points of the server and the engine child. Logs go to
standard error, so that the standard output of commands stays clean.
"""

import logging
import sys
from typing import Literal

import structlog

LogFormat = Literal["auto", "console", "json"]


def configure_logging(level: str, log_format: LogFormat = "auto") -> None:
    """Log `level` ("debug", "info", "warning", "error") and above, for structlog and logging."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    as_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderers: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if as_console
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

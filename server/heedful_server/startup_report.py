"""What a person sees while the server starts: lines, and a progress bar on a terminal.

Owns the wording's form only: on a terminal rich lines and bars, elsewhere log lines, so that what a
machine collects stays uniform. It decides nothing. Progress may come from any thread.
"""

import sys
from types import TracebackType
from typing import Self

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

log = structlog.get_logger(__name__)

_LOG_EVERY = 0.25


class StartupReport:
    """Reports to standard error; used as a context, which ends the bar."""

    def __init__(self, as_text: bool | None = None) -> None:
        """Report as text, or as log lines; None asks whether standard error is a terminal."""
        self._as_text = sys.stderr.isatty() if as_text is None else as_text
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._as_text:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._as_text:
            self._bar.stop()

    def line(self, text: str, **fields: str | int | float) -> None:
        """Say one thing; the fields are part of the log line only."""
        if self._as_text:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            log.info(text, **fields)

    def progress(self, stage: str, fraction: float) -> None:
        """Say how much of a stage is done, from 0 to 1."""
        if not self._as_text:
            self._log_progress(stage, fraction)
            return
        if stage not in self._tasks:
            for task_id in self._tasks.values():
                self._bar.update(task_id, visible=False)
            self._tasks[stage] = self._bar.add_task(stage, total=1.0)
        self._bar.update(self._tasks[stage], completed=fraction)

    def _log_progress(self, stage: str, fraction: float) -> None:
        if fraction - self._logged.get(stage, -1.0) < _LOG_EVERY:
            return
        self._logged[stage] = fraction
        log.info("loading", stage=stage, fraction=round(fraction, 2))

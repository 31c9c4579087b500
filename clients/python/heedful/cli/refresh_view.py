"""How a run looks while it works and when it is over: bars, figures, a verdict in plain words.

Owns those forms and the next command that they advise; knows neither server nor trainer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from heedful.cli.models_view import age
from heedful.cli.output import json_text, printable, stderr, write
from heedful.model_types import Refresh, RefreshAction

STAGES = ("snapshot", "reward", "policy", "gate", "publish")
_NAMES = {
    "snapshot": "reading feedback",
    "reward": "reward model",
    "policy": "policy",
    "gate": "gate",
    "publish": "publishing",
}
_FIGURES = ("loss", "accuracy", "kl", "tokens_per_s")
_MAX_FIGURES = 4
_MAX_FIGURES_OF_A_BAR = 2  # a terminal of 80 columns has room for no more
_SUBJECTS = {"paused": "is paused", "queued": "waits for a trainer", "stopped": "was stopped"}


class View(Protocol):
    """Shows a run as it goes; used in a `with` block."""

    def show(self, refresh: Refresh) -> None:
        """Shows the run as it is now."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def view_for(as_json: bool) -> View:
    """Returns JSON Lines where asked for, bars in a terminal, else a line for each stage."""
    if as_json:
        return _JsonLines()
    console = stderr()
    return _Bars(console) if console.is_terminal else _Lines(console)


class _JsonLines:
    """Every change as one line of JSON on standard output."""

    def show(self, refresh: Refresh) -> None:
        write(json_text(document(refresh), indent=None) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class _Lines:
    """One line for each stage and status, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def show(self, refresh: Refresh) -> None:
        if refresh.is_over:
            return
        stage = _NAMES.get(refresh.stage, refresh.stage)
        line = stage if refresh.status == "running" else f"{stage}: {refresh.status}"
        if line == self._last:
            return
        self._last = line
        figures = in_figures(refresh.figures)
        self._console.print(
            f"{line} · {figures}" if figures else line, style="dim", markup=False, soft_wrap=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class _Bars:
    """One bar for each stage that has begun, with its figures and the time that is left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, refresh: Refresh) -> None:
        if refresh.stage not in STAGES:
            return self._finish_before(len(STAGES))
        position = STAGES.index(refresh.stage)
        self._finish_before(position)
        status = "" if refresh.status == "running" else refresh.status
        told = in_figures(refresh.figures, _MAX_FIGURES_OF_A_BAR)
        figures = " · ".join(filter(None, (status, told)))
        if refresh.stage not in self._tasks:
            self._tasks[refresh.stage] = self._progress.add_task(
                _NAMES[refresh.stage], total=1.0, figures=figures
            )
        self._progress.update(
            self._tasks[refresh.stage], completed=refresh.stage_progress, figures=figures
        )
        return None

    def _finish_before(self, position: int) -> None:
        for stage, task in self._tasks.items():
            if STAGES.index(stage) < position:
                self._progress.update(task, completed=1.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def document(refresh: Refresh) -> dict[str, Any]:
    """Returns a run for JSON."""
    return dataclasses.asdict(refresh)


def in_figures(figures: Mapping[str, float], most: int = _MAX_FIGURES) -> str:
    """Returns the figures that say most, those that people know first."""
    known = [name for name in _FIGURES if name in figures]
    others = [name for name in figures if name not in _FIGURES]
    return " · ".join(
        f"{name.replace('_', ' ')} {figures[name]:.3g}" for name in [*known, *others][:most]
    )


def in_words(refresh: Refresh) -> str:
    """Returns in plain words how a run stands or what came of it."""
    if refresh.status == "failed":
        return f"The refresh failed: {refresh.error or 'the trainer gave no reason'}"
    if refresh.status == "stopped":
        kept = " Its last checkpoint is kept." if refresh.stage in ("reward", "policy") else ""
        return f"The refresh was stopped.{kept}"
    if refresh.status != "finished":
        return f"Run {refresh.run_id} {_SUBJECTS.get(refresh.status, 'is running')}."
    version = refresh.candidate_version
    if not version:
        reason = refresh.error or told(refresh.evidence)
        return f"No new version came of it. {reason}".strip()
    match refresh.verdict:
        case "pass":
            return f"{version} passed the gate: it is better than the champion, as far as shown."
        case "fail":
            return f"{version} failed the gate and will not be served."
        case "inconclusive":
            return (
                f"{version} is safe to try, but not proven better. "
                "Look at its answers, give some blind votes, then decide."
            )
        case _:
            return f"{version} is published; the gate was {refresh.verdict or 'not asked'}."


def after_control(action: RefreshAction, refresh: Refresh) -> str:
    """Returns what came of asking a run for something: it obeys at its next step."""
    is_paused = refresh.status == "paused"
    done = {"pause": is_paused, "resume": not is_paused, "stop": False}[action]
    if done or refresh.is_over:
        return in_words(refresh)
    verb = {"pause": "pauses", "resume": "goes on", "stop": "stops"}[action]
    return f"Run {refresh.run_id} {verb} at its next step."


def next_commands(refresh: Refresh) -> tuple[str, ...]:
    """Returns what to type next."""
    version = refresh.candidate_version
    if not refresh.is_over:
        return (f"heedful refresh watch {refresh.run_id}",)
    if refresh.status != "finished" or not version:
        return ("heedful feedback summary",)
    if refresh.verdict == "fail":
        return (f"heedful gate explain {version}",)
    return (
        f"heedful models diff champion {version} 'Your prompt'",
        "heedful gate vote 8",
        f"heedful models promote {version}",
    )


def told(evidence: Mapping[str, Any]) -> str:
    """Returns the sentence of the last stage that left one."""
    texts = [stage.get("text", "") for stage in evidence.values() if isinstance(stage, dict)]
    return next((text for text in reversed(texts) if isinstance(text, str) and text), "")


def show_end(refresh: Refresh) -> None:
    """Shows the verdict and what to type next."""
    write(f"{printable(in_words(refresh))}\n")
    for command in next_commands(refresh):
        stderr().print(f"  {command}", style="bold", markup=False, soft_wrap=True)


def show_runs(runs: Sequence[Refresh]) -> None:
    """Shows runs as a table, newest first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for heading in ("state", "method", "result", "age"):
        table.add_column(heading, overflow="fold")
    for run in runs:
        at = "" if run.is_over else f", {run.stage} {run.stage_progress:.0%}"
        kind = "" if run.kind in ("", "refresh") else f"{run.kind} "
        result = ": ".join(filter(None, (run.candidate_version, run.verdict))) or run.error
        table.add_row(
            *(run.run_id, f"{kind}{run.status}{at}", run.method),
            *(printable(result), age(run.started)),
        )
    Console(highlight=False, markup=False).print(table)

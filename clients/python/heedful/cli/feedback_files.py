"""`heedful feedback export` and `import`: the log as JSON Lines, and existing data into the log.

Owns files, progress and the report of bad lines; `preference_files.py` owns what lines mean.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from heedful.cli import feedback_options as options
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.feedback_view import exported_document
from heedful.cli.output import ExitCode, describe, fail, json_text, stderr, write, write_json
from heedful.errors import HeedfulError
from heedful.feedback_types import ImportItem, ReceiptStatus
from heedful.preference_files import COLUMNS, Line, Reader, read_lines
from heedful.sync import Client

BATCH_LINES = 200
MAX_REPORTED = 20
SHOWN_RECORDS = 3


class FormatChoice(StrEnum):
    """Choices of --format."""

    PAIRS = "pairs"
    RANKINGS = "rankings"
    THUMBS = "thumbs"
    DEMONSTRATIONS = "demonstrations"


@dataclass(slots=True)
class Tally:
    """What became of the lines of one file."""

    file: str
    format: str | None = None
    good: int = 0
    """Records that were understood, before the first bad line where that ended the import."""
    stored: int = 0
    duplicate: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    """What is wrong with the first of the bad lines."""
    first: list[ImportItem] = field(default_factory=list)
    """The first records (--dry-run)."""


def export_log(
    target: TargetOption = TARGET,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Limit for all of it.")
    ] = 3600.0,
    wait: WaitOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write as a whole; default: standard output."),
    ] = None,
    after_seq: Annotated[
        int, typer.Option("--after-seq", min=0, help="Only what came after this position.")
    ] = 0,
    completions: Annotated[
        bool, typer.Option("--completions", help="Add the judged completions with their prompts.")
    ] = False,
    completion: options.Completion = None,
    comparison: options.Comparison = None,
    rater: options.Rater = None,
    version: options.Version = None,
    tag: options.Tag = None,
    kind: options.Kinds = None,
    current: options.Current = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines; the export always does.")
    ] = True,
) -> None:
    """Write the log as JSON Lines, one judgement a line, oldest first."""
    chosen = options.criteria(completion, comparison, rater, version, tag, kind, current)
    with ready_client(target, timeout, wait, "feedback") as client:
        found = client.export_feedback(
            after_seq=after_seq, include_completions=completions, **chosen
        )
        lines = (
            json_text(exported_document(item, completions), indent=None) + "\n" for item in found
        )
        if output is None:
            for line in lines:
                write(line)
            return
        count = _write_whole(output, lines)
    stderr().print(f"{count} judgements in {output}", style="dim", markup=False)


def import_file(
    file: Annotated[
        Path, typer.Argument(help="JSON Lines, also .jsonl.gz.", exists=True, dir_okay=False)
    ],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    format_: Annotated[
        FormatChoice | None,
        typer.Option("--format", help="What the lines hold; default: as the first one looks."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="COLUMN=FIELD",
            help=f"A column with another name; may be repeated. Fields: {', '.join(COLUMNS)}.",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Take prompts as plain text, without chat.")
    ] = False,
    source: Annotated[
        str | None, typer.Option("--source", help="Name to keep with it; default: the file's.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read everything, send nothing.")
    ] = False,
    as_json: options.JsonFlag = False,
) -> None:
    """Record existing preference data: pairs, rankings, thumbs or demonstrations.

    Safe to repeat: lines that were imported before are recognised.

    A bad line ends it, unless --skip-bad leaves bad lines out.
    """
    reader = Reader(
        file.name, format_.value if format_ else None, _columns(column or ()), plain_text=text
    )
    tally = Tally(file.name)
    try:
        if dry_run:
            _read_all(file, reader, tally)
        else:
            with ready_client(target, timeout, wait, "feedback") as client:
                _send_all(client, file, reader, tally, source or file.name, skip_bad)
    except OSError as error:
        raise fail(f"{file}: {error.strerror or error}", ExitCode.FAILED) from None
    tally.format = reader.format
    _report(tally, dry_run, as_json)
    if tally.bad and not skip_bad:
        raise typer.Exit(int(ExitCode.FAILED))


def send_file(client: Client, file: Path, reader: Reader) -> Tally:
    """Imports a file as `import` does: up to its first bad line.

    Raises:
        HeedfulError: a whole batch failed.
    """
    tally = Tally(file.name)
    try:
        _send_all(client, file, reader, tally, file.name, skip_bad=False)
    except OSError as error:
        raise fail(f"{file}: {error.strerror or error}", ExitCode.FAILED) from None
    tally.format = reader.format
    return tally


def _write_whole(path: Path, lines: Iterable[str]) -> int:
    """Writes a file that is there as a whole or not at all; returns the number of lines."""
    count = 0
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                for line in lines:
                    file.write(line)
                    count += 1
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise fail(f"{path}: {error.strerror or error}", ExitCode.FAILED) from None
    return count


def _columns(given: Iterable[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for text in given:
        column, _, known = text.rpartition("=")
        if not column or known not in COLUMNS:
            raise typer.BadParameter(f"--map takes COLUMN=FIELD, not {text}; see --help")
        columns[column] = known
    return columns


def _read_all(file: Path, reader: Reader, tally: Tally) -> None:
    for line in read_lines(file, reader):
        if line.item is None:
            _bad(tally, line.number, line.problem)
            continue
        tally.good += 1
        if len(tally.first) < SHOWN_RECORDS:
            tally.first.append(line.item)


def _send_all(
    client: Client, file: Path, reader: Reader, tally: Tally, source: str, skip_bad: bool
) -> None:
    """Sends good lines in batches, up to the first bad one unless bad ones are left out."""
    batch: list[Line] = []
    with _progress(file) as (progress, task):
        for line in read_lines(file, reader):
            if line.item is None:
                _bad(tally, line.number, line.problem)
                if not skip_bad:
                    break
                continue
            batch.append(line)
            if len(batch) == BATCH_LINES:
                _send(client, batch, tally, source)
                progress.update(task, completed=line.end_byte)
                batch = []
                if tally.bad and not skip_bad:
                    return
        _send(client, batch, tally, source)


def _send(client: Client, batch: list[Line], tally: Tally, source: str) -> None:
    items = [line.item for line in batch if line.item is not None]
    if not items:
        return
    for line, outcome in zip(batch, client.import_feedback(items, source=source), strict=True):
        if isinstance(outcome, HeedfulError):
            _bad(tally, line.number, describe(outcome))
            continue
        tally.good += 1
        if outcome.status is ReceiptStatus.DUPLICATE:
            tally.duplicate += 1
        else:
            tally.stored += 1


def _bad(tally: Tally, number: int, problem: str) -> None:
    tally.bad += 1
    if len(tally.problems) < MAX_REPORTED:
        tally.problems.append(f"line {number}: {problem}")


@contextmanager
def _progress(file: Path) -> Iterator[tuple[Progress, TaskID]]:
    console = stderr()
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield bar, bar.add_task(file.name, total=file.stat().st_size)


def _report(tally: Tally, dry_run: bool, as_json: bool) -> None:
    if as_json:
        write_json(tally)
        return
    console = stderr()
    for problem in tally.problems:
        console.print(f"{tally.file}: {problem}", style="red", markup=False, soft_wrap=True)
    if tally.bad > len(tally.problems):
        console.print(f"and {tally.bad - len(tally.problems)} more bad lines", style="red")
    kind = tally.format or "nothing"
    if dry_run:
        for item in tally.first:
            write_json(item)
        write(f"{tally.good} records of {kind}, {tally.bad} bad lines; nothing was sent\n")
    else:
        write(
            f"{tally.stored} records of {kind} stored, {tally.duplicate} there before, "
            f"{tally.bad} bad lines\n"
        )

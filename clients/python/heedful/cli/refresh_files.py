"""The files of `heedful refresh`: all of them read to their ends before a line of one is imported.

Owns which file holds what, and that one bad line keeps everything from being imported or started.
What lines mean is in `preference_files.py` and `prompt_file.py`, sending them in
`feedback_files.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heedful.cli.feedback_files import MAX_REPORTED, send_file
from heedful.cli.output import ExitCode, fail, stderr
from heedful.preference_files import FORMATS, Reader, read_lines
from heedful.prompt_file import read_prompts
from heedful.sync import Client

COMPARISONS: Final = ("pairs", "rankings")
DEMONSTRATIONS: Final = ("demonstrations",)
_NOTHING = "Nothing was imported. Nothing was started."


@dataclass(frozen=True, slots=True)
class Imported:
    """A file for the log, and the formats that it may have."""

    path: Path
    formats: tuple[str, ...] = FORMATS

    @property
    def reader(self) -> Reader:
        """How its lines are read: by the one format that it may have, else as the first looks."""
        reader = Reader(self.path.name)
        if self.formats == DEMONSTRATIONS:
            reader.format = "demonstrations"
        return reader


def require_whole(imported: list[Imported], prompts: Path | None) -> None:
    """Ends the command where a line of any of these files is bad."""
    problems: list[str] = []
    for file in imported:
        problems += [f"{file.path.name}: {problem}" for problem in _problems(file)]
    if prompts is not None:
        problems += [f"{prompts.name}: {problem}" for problem in _prompt_problems(prompts)]
    if not problems:
        return
    for problem in problems[:MAX_REPORTED]:
        stderr().print(problem, style="red", markup=False, soft_wrap=True)
    lines = "1 line is" if len(problems) == 1 else f"{len(problems)} lines are"
    raise fail(f"{lines} not as they must be", ExitCode.FAILED, _NOTHING)


def import_all(client: Client, imported: list[Imported]) -> None:
    """Sends files that were found whole; ends the command where the server refuses a line.

    Raises:
        HeedfulError: a whole batch failed.
    """
    for file in imported:
        tally = send_file(client, file.path, file.reader)
        stderr().print(
            f"{file.path.name}: {tally.stored} records stored, {tally.duplicate} there before",
            style="dim",
            markup=False,
        )
        if tally.bad:
            hint = "Nothing was started. What was stored is recognised when this is repeated."
            raise fail(f"{file.path.name}: {tally.problems[0]}", ExitCode.FAILED, hint)


def _problems(file: Imported) -> list[str]:
    reader, found, count = file.reader, [], 0
    try:
        for line in read_lines(file.path, reader):
            count += 1
            if line.item is None:
                found.append(f"line {line.number}: {line.problem}")
            elif reader.format not in file.formats:
                wanted = " or ".join(file.formats)
                return [f"line {line.number}: holds {reader.format}, not {wanted}"]
    except OSError as error:
        return [error.strerror or str(error)]
    return found if count else ["holds no record"]


def _prompt_problems(path: Path) -> list[str]:
    try:
        return list(read_prompts(path).problems)
    except OSError as error:
        return [error.strerror or str(error)]

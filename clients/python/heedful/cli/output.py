"""What the commands print and how they end: consoles, JSON, exit codes, one line per error.

Answers go to standard output and everything else to standard error, so that a pipe gets answers
only. Knows no command.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from heedful.errors import DeadlineExceeded, HeedfulError, InvalidRequest, NotConnected, Unavailable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class ExitCode(IntEnum):
    """How a command ends; part of what scripts may rely on."""

    OK = 0
    FAILED = 1
    """The request was refused or failed; `status`: not ready; `bench`: some request failed."""
    USAGE = 2
    UNAVAILABLE = 3
    """No server answers, or it was not ready in time."""
    TIMEOUT = 4
    """`--timeout` passed before the answer was complete."""
    INTERRUPTED = 130


def stderr() -> Console:
    """Returns a console for everything that is not an answer."""
    return Console(stderr=True, highlight=False)


def write(text: str) -> None:
    """Writes a piece of an answer at once; a terminal never sees its control characters."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Returns a text without the characters that could command a terminal."""
    return text.translate(_CONTROL)


def write_json(value: "DataclassInstance") -> None:
    """Writes a dataclass as one JSON document."""
    write(to_json(value) + "\n")


def to_json(value: "DataclassInstance") -> str:
    """Returns a dataclass as JSON; times are written in ISO form."""
    return json_text(dataclasses.asdict(value))


def json_text(value: object, indent: int | None = 2) -> str:
    """Returns plain values as JSON; times are written in ISO form."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)


def fail(message: str, code: ExitCode, hint: str = "") -> typer.Exit:
    """Prints one line (and a hint) and returns what the caller raises to end."""
    console = stderr()
    console.print(f"heedful: {message}", style="bold red", markup=False, soft_wrap=True)
    if hint:
        console.print(hint, style="dim", markup=False, soft_wrap=True)
    return typer.Exit(int(code))


def describe(error: HeedfulError) -> str:
    """Returns one line that says what went wrong and, where known, in which field or request."""
    text = " ".join(error.message.split())
    if isinstance(error, InvalidRequest) and error.field and not text.startswith(error.field):
        text = f"{error.field}: {text}"
    return f"{text} (request {error.request_id})" if error.request_id else text


@contextmanager
def errors_as_lines(target: str) -> Iterator[None]:
    """Turns the client's errors into one line and an exit code."""
    try:
        yield
    except NotConnected as error:
        hint = f"Is a server running at {target}? Start one with: heedful serve"
        raise fail(describe(error), ExitCode.UNAVAILABLE, hint) from None
    except Unavailable as error:
        raise fail(describe(error), ExitCode.UNAVAILABLE) from None
    except DeadlineExceeded as error:
        raise fail(describe(error), ExitCode.TIMEOUT) from None
    except HeedfulError as error:
        raise fail(describe(error), ExitCode.FAILED) from None


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")

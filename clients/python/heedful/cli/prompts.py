"""Prompts that a person brings to a comparison: typed, from a file, or from the log.

Owns where they come from and how each is shown; knows nothing of what is done with them.
"""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from heedful.cli.output import ExitCode, fail
from heedful.sync import Client
from heedful.types import Message, Prompt

Arguments: TypeAlias = Annotated[
    list[str] | None, typer.Argument(help="Prompts, one user message each.", show_default=False)
]
File: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="One prompt a line; in .jsonl objects with 'prompt' or 'messages'.",
        exists=True,
        dir_okay=False,
    ),
]
FromLog: TypeAlias = Annotated[
    int | None,
    typer.Option("--from-log", metavar="N", min=1, help="The last N prompts that were judged."),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and the text to show for it."""

    prompt: Prompt
    shown: str


def collect(
    client: Client, typed: Iterable[str], file: Path | None, from_log: int | None
) -> list[Asked]:
    """Returns the prompts of all three sources in that order; empty where none was named.

    Raises:
        HeedfulError: the log could not be read.
    """
    found = [Asked(text, text) for text in typed]
    if file is not None:
        found += _read_file(file)
    if from_log is not None:
        found += _read_log(client, from_log)
    return found


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Returns the prompt with a system message before it; token ids stay as they are."""
    if system is None or not isinstance(prompt, str):
        return prompt
    return (Message("system", system), Message("user", prompt))


def _read_file(file: Path) -> list[Asked]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"{file}: {error}", ExitCode.FAILED) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix not in (".jsonl", ".json"):
        return [Asked(line.strip(), line.strip()) for _, line in numbered]
    return [_record(line, f"{file.name}, line {number}") for number, line in numbered]


def _record(line: str, place: str) -> Asked:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise fail(f"{place}: {error}", ExitCode.FAILED) from None
    if isinstance(record, str):
        return Asked(record, record)
    given = (record.get("messages") or record.get("prompt")) if isinstance(record, dict) else None
    if isinstance(given, str):
        return Asked(given, given)
    if not isinstance(given, list) or not all(_is_turn(turn) for turn in given):
        raise fail(f"{place}: has neither 'prompt' nor 'messages'", ExitCode.FAILED)
    turns = [Message(turn["role"], turn["content"]) for turn in given]
    return Asked(turns, "\n".join(f"{turn.role}: {turn.content}" for turn in turns))


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and set(turn) >= {"role", "content"}


def _read_log(client: Client, count: int) -> list[Asked]:
    """Returns the last prompts of judged completions, each once, oldest first."""
    last: deque[Asked] = deque(maxlen=count)
    for item in client.export_feedback(include_completions=True, current_only=True):
        for logged in item.completions[:1]:
            asked = Asked(logged.prompt_token_ids, logged.prompt_text)
            if logged.prompt_token_ids:
                if asked in last:
                    last.remove(asked)
                last.append(asked)
    return list(last)

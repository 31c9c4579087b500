"""A file of prompts in JSON Lines: what PPO asks beside the prompts of the log.

Owns reading it as a whole and what is wrong with each of its lines; `preference_texts.py` owns what
a prompt may look like. Each line is an object with `prompt` (a text) or `messages` (a conversation
that does not end with the assistant's words). The command line and the trainer read it alike. Pure
but for reading the file, any thread.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from heedful.preference_texts import BadRecord, conversation
from heedful.types import Message

_FIELDS = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, and the lines that hold none."""

    prompts: tuple[tuple[Message, ...], ...]
    """In their order."""
    problems: tuple[str, ...]
    """Line, field and what is wrong; empty for a good file."""


def read_prompts(path: Path) -> PromptFile:
    """Returns what a file holds; a file without a prompt is a problem too.

    Raises:
        OSError: it cannot be read.
    """
    prompts: list[tuple[Message, ...]] = []
    problems: list[str] = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                prompts.append(_prompt(raw))
            except BadRecord as error:
                problems.append(f"line {number}: {error}")
    if not prompts and not problems:
        problems.append("holds no prompt")
    return PromptFile(tuple(prompts), tuple(problems))


def _prompt(raw: bytes) -> tuple[Message, ...]:
    try:
        record = json.loads(raw)
        # Half of a surrogate pair passes as JSON, but is no text.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"is a JSON {type(record).__name__}, not an object")
    for name in _FIELDS:
        if record.get(name) is not None:
            try:
                found = conversation(record[name])
                return (Message("user", found),) if isinstance(found, str) else found
            except BadRecord as error:
                raise BadRecord(f"{name}: {error}") from None
    raise BadRecord("has neither prompt nor messages")

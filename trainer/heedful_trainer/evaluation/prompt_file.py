"""The user's own prompts for an evaluation.

Owns the format: one prompt a line, or in .jsonl objects with `prompt` or `messages`, as
`heedful models diff` takes them. Reads one file; any thread.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import heedful

from heedful_trainer.evaluation.datasets import MAX_BYTES, DataUnusable, Loaded
from heedful_trainer.evaluation.reading import Row, json_lines


def read_prompts(path: Path) -> list[heedful.Prompt]:
    """Return the prompts of a file.

    Raises:
        DataUnusable: it cannot be read, or a line is no prompt; the message names it.
    """
    file = _load(path)
    if path.suffix in (".jsonl", ".json"):
        found = [_prompt(row) for row in json_lines(file)]
    else:
        found = [line.strip() for line in file.text.splitlines() if line.strip()]
    if not found:
        raise DataUnusable(f"{path}: holds no prompt")
    return found


def _load(path: Path) -> Loaded:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataUnusable(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnusable(f"{path}: cannot be read: {error}") from None
    return Loaded(path, text, hashlib.sha256(content).hexdigest(), published=False)


def _prompt(row: Row) -> heedful.Prompt:
    turns = row.fields.get("messages")
    if turns is None:
        return row.text("prompt")
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise row.wrong("messages", "has to be a list of objects with role and content")
    return [heedful.Message(turn["role"], turn["content"]) for turn in turns]


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(turn.get(name), str) for name in ("role", "content")
    )

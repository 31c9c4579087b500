"""The user's own prompts for an evaluation.

Owns the two forms of the file: one prompt a line, or JSON Lines, which `heedful.prompt_file` reads.
Reads one file; any thread.
"""

from __future__ import annotations

from pathlib import Path

import heedful
from heedful import prompt_file

from heedful_trainer.evaluation.datasets import MAX_BYTES, DataUnusable


def read_prompts(path: Path) -> list[heedful.Prompt]:
    """Return the prompts of a file.

    Raises:
        DataUnusable: it cannot be read, or a line is no prompt; the message names it.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataUnusable(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
        if path.suffix in (".jsonl", ".json"):
            return _objects(path)
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnusable(f"{path}: cannot be read: {error}") from None
    found: list[heedful.Prompt] = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataUnusable(f"{path}: holds no prompt")
    return found


def _objects(path: Path) -> list[heedful.Prompt]:
    found = prompt_file.read_prompts(path)
    if found.problems:
        raise DataUnusable(f"{path}: {found.problems[0]}")
    return list(found.prompts)

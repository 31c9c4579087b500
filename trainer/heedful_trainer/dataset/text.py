"""Token ids of what people wrote.

Owns the one way from text to ids in the trainer: once, without control tokens (what looks like one
in a person's text is text), closed by the end token. It reads the base's tokenizer files, imports
neither torch nor transformers. Safe to share between threads.
"""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import tokenizers

from heedful_trainer.errors import ModelUnusable


class TextEncoder:
    """The base's tokenizer for texts that people wrote.

    Attributes:
        eos_token_id: closes a text.
    """

    eos_token_id: int

    def __init__(self, directory: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for every defect
            raise ModelUnusable(f"{directory / 'tokenizer.json'}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.eos_token_id = self._eos(directory)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole answer, closed by the end token."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return (*ids, self.eos_token_id)

    def decode(self, ids: tuple[int, ...]) -> str:
        """Return the text of ids, without control tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _eos(self, directory: Path) -> int:
        named = _json(directory / "tokenizer_config.json").get("eos_token")
        name = named.get("content") if isinstance(named, dict) else named
        token_id = self._tokenizer.token_to_id(name) if name else None
        if token_id is None:
            token_id = _json(directory / "config.json").get("eos_token_id")
        if isinstance(token_id, list):
            token_id = min(token_id)
        if not isinstance(token_id, int):
            raise ModelUnusable(f"{directory}: names no end token, so no answer could ever end")
        return token_id


def edit_distance(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Return how much of two texts differs: 0 nothing, 1 all."""
    return 1 - SequenceMatcher(None, first, second, autojunk=False).ratio()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content if isinstance(content, dict) else {}

"""Text for ptx: where it comes from, and which texts a step reads.

Owns the cache of what the reference wrote by itself (one file for each base: its own text is where
the expected gradient of the language-model loss is zero, so that ptx holds the policy in place and
teaches nothing), the user's corpus instead, and the order of reading. One thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from heedful_trainer.backbone import Backbone, Batch
from heedful_trainer.dataset.text import TextEncoder
from heedful_trainer.errors import InvalidConfig
from heedful_trainer.packing import Row, cut
from heedful_trainer.rollouts.records import Ids

_FEWEST_TOKENS = 2  # the first token is only read


class PtxTexts:
    """Texts in a fixed order, read round and round.

    Attributes:
        cursor: how many were read; with the seed it decides what comes next.
    """

    def __init__(
        self, texts: Sequence[Ids], backbone: Backbone, seed: int, max_batch_tokens: int
    ) -> None:
        # A row: the first token as prompt, the rest predicted.
        self._rows = [Row(ids[:1], (ids[1:],)) for ids in texts if len(ids) >= _FEWEST_TOKENS]
        self._backbone, self._seed, self._max_tokens = backbone, seed, max_batch_tokens
        self.cursor = 0

    def next(self, count: int) -> list[Batch]:
        """Return the next texts as micro-batches; none where there is no text."""
        if not self._rows or not count:
            return []
        chosen = [self._at(self.cursor + i) for i in range(count)]
        self.cursor += count
        groups = cut([row.num_tokens for row in chosen], self._max_tokens)
        return [self._backbone.batch([chosen[i] for i in group]) for group in groups]

    def _at(self, position: int) -> Row:
        epoch, within = divmod(position, len(self._rows))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._rows), generator=generator)
        return self._rows[int(order[within])]


def reference_texts(path: Path, draw: Callable[[], Sequence[Ids]]) -> list[Ids]:
    """Return what the reference wrote, from the file, or drawn and put there.

    Args:
        path: of the base's cache.
        draw: samples texts from the reference, unconditioned.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return [tuple(json.loads(line)) for line in lines]
    texts = [tuple(ids) for ids in draw()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(list(ids))}\n" for ids in texts)
        file.flush()
        os.fsync(file.fileno())
    temp.rename(path)
    return texts


def start_token(directory: Path) -> int:
    """Return the token that a text begins with: from it alone the reference writes unprompted.

    Raises:
        ModelUnusable: the model names neither that nor an end token.
    """
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(content.get("bos_token_id"), int):
            return int(content["bos_token_id"])
    return TextEncoder(directory).eos_token_id


def cache_path(home: Path, base_id: str, count: int, max_tokens: int) -> Path:
    """Return where a base's own text is kept."""
    name = hashlib.sha256(f"{base_id}|{count}|{max_tokens}".encode()).hexdigest()[:16]
    return home / "ptx" / f"{name}.jsonl"


def corpus_texts(path: Path, encoder: TextEncoder, count: int, max_tokens: int) -> list[Ids]:
    """Return pieces of a file of texts: JSON lines with a field ``text``, or plain paragraphs.

    Raises:
        InvalidConfig: the file cannot be read, or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            texts = [str(json.loads(line)["text"]) for line in content.splitlines() if line]
        else:
            texts = [part for part in content.split("\n\n") if part.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(f"trainer.ppo.ptx.corpus: {path}: {error}") from error
    found: list[Ids] = []
    for text in texts:
        ids = encoder.encode_answer(text)
        found += [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
        if len(found) >= count:
            break
    found = [ids for ids in found if len(ids) >= _FEWEST_TOKENS][:count]
    if not found:
        raise InvalidConfig(f"trainer.ppo.ptx.corpus: {path} holds no text")
    return found

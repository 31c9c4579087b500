"""Writes tokenizer.json for byte-level BPE vocabularies that come without one.

Owns the JSON of such a tokenizer, for GPT-2-style `vocab.json` + `merges.txt` and for the
vocabularies inside GGUF files. It is written key by key rather than by the `tokenizers` library,
so that its hash, which is part of a policy's identity, does not depend on a library version. Pure
apart from reading the two vocabulary files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from heedful_server.errors import ModelUnusable
from heedful_server.text.model_files import read_json, special_tokens

PreTokenizer = Literal["gpt-2", "smollm"]

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def byte_level_tokenizer_json(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    added_tokens: Sequence[dict[str, Any]],
    pre_tokenizer: PreTokenizer,
    prefix_token: str | None,
) -> bytes:
    """Return a tokenizer.json.

    Args:
        vocab: token in the byte-level alphabet -> id.
        merges: pairs in order of rank.
        added_tokens: entries as made by `added_token`, in order of id.
        pre_tokenizer: `gpt-2` splits by GPT-2's expression; `smollm` first sets each digit apart.
        prefix_token: token put before every text that is encoded with special tokens.
    """
    digits = {"type": "Digits", "individual_digits": True}
    sequence = {"type": "Sequence", "pretokenizers": [digits, _BYTE_LEVEL]}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": sequence if pre_tokenizer == "smollm" else _BYTE_LEVEL,
        "post_processor": _prefix_processor(prefix_token, vocab) if prefix_token else None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    """Return an entry of `added_tokens` that matches its exact text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def tokenizer_json_from_vocab_files(model_dir: Path) -> bytes:
    """Return a tokenizer.json made of vocab.json and merges.txt (GPT-2 and OPT repositories).

    Raises:
        ModelUnusable: the files are missing or do not fit together.
    """
    vocab = read_json(model_dir / "vocab.json")
    if not vocab or not (model_dir / "merges.txt").is_file():
        raise ModelUnusable(_missing(model_dir))
    if any(type(token_id) is not int for token_id in vocab.values()):
        raise ModelUnusable(f"{model_dir / 'vocab.json'}: token ids must be integers")
    merges = _read_merges(model_dir / "merges.txt")
    tokens = special_tokens(model_dir)
    known = sorted({vocab[token]: token for token in tokens.values() if token in vocab}.items())
    adds_bos = read_json(model_dir / "tokenizer_config.json").get("add_bos_token") is True
    bos = tokens.get("bos_token") if adds_bos else None
    return byte_level_tokenizer_json(
        vocab,
        merges,
        [added_token(token_id, token, special=True) for token_id, token in known],
        "gpt-2",
        bos if bos in vocab else None,
    )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, separator, right = line.rstrip("\r").partition(" ")
        if not separator or not left or not right:
            raise ModelUnusable(f"{path}: line {number} is no pair of tokens")
        merges.append((left, right))
    return merges


def _prefix_processor(token: str, vocab: dict[str, int]) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]}},
    }


def _missing(model_dir: Path) -> str:
    if (model_dir / "tokenizer.model").is_file():
        return (
            f"{model_dir}: tokenizer.model without tokenizer.json is not supported; write one with "
            "transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    return f"{model_dir}: no tokenizer.json, and no vocab.json with merges.txt"

"""One judged event as a line of a dataset: token ids and what was said about them.

Owns the record and both directions of its JSON. It knows neither store nor model. Pure, any thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "calibration", "gate"]
Kind = Literal["ranking", "thumb", "rating", "correction", "demonstration", "critique", "label"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "gate")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it was sampled; never tokenised again."""

    ids: tuple[int, ...]  # ends in the end token only where the answer ended of itself
    completion_id: str = ""
    policy_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One event. Earlier turns are within the prompt: nothing is learned from them."""

    seq: int  # place in the log
    kind: Kind
    split: Split
    cluster: str  # prompts that count as the same
    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    rater: str = ""
    end_user: str = ""
    source: str = ""  # "comparison", "import:NAME", "rpc", …
    messages: str = ""  # the chat as JSON; empty for plain text
    ranks: tuple[int, ...] = ()  # of a ranking: per answer, small is good, equal is tied
    all_bad: bool = False  # of a ranking: none is acceptable
    up: bool | None = None  # of a thumb
    value: int | None = None  # of a rating, 1 to 7
    corrected: tuple[int, ...] = ()  # of a correction: what a person wrote, with the end token
    edit_distance: float = 0.0  # of a correction: 0 nothing changed, 1 nothing kept
    text: str = ""  # of a critique; kept for later, no method learns from it
    flags: Mapping[str, bool] = field(default_factory=dict)  # of a label; as for text

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in _EMPTY}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Example:
        """Return the example that ``to_json`` wrote."""
        fields = dict(value)
        fields["answers"] = tuple(
            Answer(**{**item, "ids": tuple(item["ids"])}) for item in value.get("answers", ())
        )
        for name in ("prompt", "ranks", "corrected"):
            fields[name] = tuple(value.get(name, ()))
        return cls(**fields)


_EMPTY: tuple[object, ...] = ("", (), [], {}, None)


def to_lines(examples: Iterable[Example]) -> bytes:
    """Return a dataset file's bytes; equal examples give equal bytes."""
    dump = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
    return "".join(f"{dump(example.to_json())}\n" for example in examples).encode()


def read(path: Path) -> list[Example]:
    """Return the examples of a dataset file."""
    with path.open(encoding="utf-8") as file:
        return [Example.from_json(json.loads(line)) for line in file]

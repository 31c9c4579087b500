"""Existing preference data in JSON Lines (also .jsonl.gz) to records that can be imported.

Owns reading lines, guessing what the columns mean, and the id under which a repeated import is
recognised; `preference_texts.py` owns what lies in a column. The format is guessed from the first
record and then holds for the whole file, so that a line that lacks its label is an error and never
becomes something else. Pure but for reading the file, any thread.

    format           columns (or their usual other names)
    pairs            prompt, chosen, rejected; without a prompt, what both begin with
    rankings         prompt, completions and ranking (positions, best first), ranks (1 is best)
                     or scores (more is better); or completions that each hold a rank or score
    thumbs           prompt, completion and label (true/false, 1/0/-1, "up"/"down", …)
    demonstrations   prompt and completion, or messages that end with the assistant's
"""

import contextlib
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast, get_args

from heedful.feedback_types import Demonstration, ImportItem, Thumb
from heedful.preference_texts import (
    BadRecord,
    answer_text,
    conversation,
    is_blank,
    split_answer,
    split_pair,
    with_prompt,
)
from heedful.types import Prompt, Text

Record: TypeAlias = Mapping[str, Any]
Format: TypeAlias = Literal["pairs", "rankings", "thumbs", "demonstrations"]
_Judgement: TypeAlias = tuple[tuple[int, ...], ...] | Thumb | Demonstration
FORMATS: tuple[str, ...] = get_args(Format)

# Servers read requests of 4 MiB unless told otherwise, and a record travels whole.
MAX_LINE_BYTES = 3 * 1024 * 1024
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
    "completions": ("completions", "responses", "answers", "candidates"),
    "ranking": ("ranking",),
    "ranks": ("ranks",),
    "scores": ("scores",),
    "completion": ("completion", "response", "output", "answer"),
    "label": ("label", "thumb", "thumbs", "rating"),
    "messages": ("messages", "conversations", "conversation"),
    "rater": ("rater_id", "rater", "annotator", "worker"),
    "tags": ("tags",),
}
"""Names of columns by field, in the order in which they are looked for."""

_UP = (True, "up", "good", "positive", "yes", "true", "1", "+1", "thumbs_up", "like")
_DOWN = (False, "down", "bad", "negative", "no", "false", "0", "-1", "thumbs_down", "dislike")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file: its record, or what is wrong with it; numbers start at 1."""

    number: int
    item: ImportItem | None
    problem: str = ""
    end_byte: int = 0
    """Bytes of the file, as it lies on the disk, that were read so far."""


@dataclass(slots=True)
class Reader:
    """How the lines of one file are understood; `format` is found with the first record."""

    source: str
    """Name of the file, part of every import id."""
    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field by column, for columns that have other names."""
    plain_text: bool = False
    """Prompts that are no conversation are plain text instead of one user message."""

    def item(self, raw: bytes, number: int) -> ImportItem:
        """Returns the record on line `number`.

        Raises:
            BadRecord: it is not JSON, lacks a column, or contradicts itself.
        """
        parsed = _parse(raw)
        record = _fields(parsed, self.columns)
        if self.format is None:
            self.format = guess_format(record)
        if self.format is None:
            names = ", ".join(parsed) or "none"
            raise BadRecord(f"no format has these columns: {names}; see --format and --map")
        prompt, completions, judgement = _CONVERTERS[self.format](record)
        if any(is_blank(text) for text in completions):
            raise BadRecord("a completion is empty")
        if self.plain_text and isinstance(prompt, str):
            prompt = Text(prompt)
        return ImportItem(
            import_id=import_id(self.source, number, raw),
            prompt=prompt,
            completions=completions,
            judgement=judgement,
            rater_id=str(record.get("rater", "")),
            tags=_tags(record),
        )


def read_lines(path: Path, reader: Reader) -> Iterator[Line]:
    """Yields the lines of a file that are not blank, good and bad ones in their order.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        packed = path.suffix == ".gz"
        with gzip.open(file) if packed else contextlib.nullcontext(file) as opened:
            lines = cast(IO[bytes], opened)
            number = 0
            try:
                for number, raw in enumerate(_raw_lines(lines), start=1):
                    if raw.strip() or len(raw) > MAX_LINE_BYTES:
                        yield _line(reader, raw, number, file.tell())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Line(number + 1, None, f"the file is damaged: {error}", file.tell())


def guess_format(record: Record) -> Format | None:
    """Returns what the fields of a record amount to, None where that is nothing known."""
    if "chosen" in record and "rejected" in record:
        return "pairs"
    if "completions" in record:
        return "rankings"
    if "completion" in record and "label" in record:
        return "thumbs"
    if "messages" in record or ("completion" in record and {"prompt", "input"} & record.keys()):
        return "demonstrations"
    return None


def import_id(source: str, number: int, raw: bytes) -> str:
    """Returns the id of a line: it changes with the file's name, the number and the content."""
    head = f"{source}\n{number}\n".encode()
    return hashlib.sha256(head + raw.strip()).hexdigest()[:32]


def _line(reader: Reader, raw: bytes, number: int, end_byte: int) -> Line:
    try:
        return Line(number, reader.item(raw, number), "", end_byte)
    except BadRecord as error:
        return Line(number, None, str(error), end_byte)


def _raw_lines(lines: IO[bytes]) -> Iterator[bytes]:
    """Yields lines; of one that is too long only its beginning."""
    while raw := lines.readline(MAX_LINE_BYTES + 1):
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = lines.readline(MAX_LINE_BYTES + 1)
        yield raw


def _parse(raw: bytes) -> Record:
    if len(raw) > MAX_LINE_BYTES:
        raise BadRecord(f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(raw)
        # Half of a surrogate pair passes as JSON, but is no text.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"is a JSON {type(record).__name__}, not an object")
    return record


def _fields(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record by field; named columns first, then the usual names."""
    fields = {
        known: record[name] for name, known in columns.items() if record.get(name) is not None
    }
    for known, names in COLUMNS.items():
        for name in names:
            if known not in fields and name not in columns and record.get(name) is not None:
                fields[known] = record[name]
    return fields


def _pair(record: Record) -> tuple[Prompt, tuple[str, ...], tuple[tuple[int, ...], ...]]:
    chosen, rejected = _needed(record, "chosen"), _needed(record, "rejected")
    if "prompt" not in record and "input" in record:
        record = {**record, "prompt": record["input"], "input": ""}
    prompt, first, second = split_pair(record.get("prompt"), chosen, rejected)
    if first == second:
        raise BadRecord("chosen and rejected are the same")
    return with_prompt(prompt, record), (first, second), ((0,), (1,))


def _ranked(record: Record) -> tuple[Prompt, tuple[str, ...], tuple[tuple[int, ...], ...]]:
    given = _needed(record, "completions")
    if not isinstance(given, list) or len(given) < 2:
        raise BadRecord("completions must be a list of at least two")
    completions = tuple(answer_text(item) for item in given)
    return _prompt(record), completions, _groups(record, given)


def _thumbed(record: Record) -> tuple[Prompt, tuple[str, ...], Thumb]:
    prompt, completion = _answered(record)
    return prompt, (completion,), Thumb(_is_up(_needed(record, "label")))


def _demonstrated(record: Record) -> tuple[Prompt, tuple[str, ...], Demonstration]:
    prompt, completion = _answered(record)
    return prompt, (completion,), Demonstration()


_CONVERTERS: dict[Format, Callable[[Record], tuple[Prompt, tuple[str, ...], _Judgement]]] = {
    "pairs": _pair,
    "rankings": _ranked,
    "thumbs": _thumbed,
    "demonstrations": _demonstrated,
}


def _answered(record: Record) -> tuple[Prompt, str]:
    if "completion" not in record and "messages" in record:
        prompt, completion = split_answer(record["messages"])
        return with_prompt(prompt, record), completion
    return _prompt(record), answer_text(_needed(record, "completion"))


def _prompt(record: Record) -> Prompt:
    if "prompt" in record or "input" not in record:
        return with_prompt(conversation(_needed(record, "prompt")), record)
    return with_prompt(conversation(record["input"]), {**record, "input": ""})


def _groups(record: Record, completions: list[Any]) -> tuple[tuple[int, ...], ...]:
    count = len(completions)
    if "ranking" in record:
        return _from_positions(record["ranking"], count)
    if "ranks" in record:
        return _from_numbers(record["ranks"], count, "ranks")
    if "scores" in record:
        return _from_numbers(record["scores"], count, "scores", best_is_least=False)
    if not all(isinstance(item, dict) for item in completions):
        raise BadRecord("has no ranking, ranks or scores")
    if all("rank" in item for item in completions):
        return _from_numbers([item["rank"] for item in completions], count, "ranks")
    if all("score" in item for item in completions):
        scores = [item["score"] for item in completions]
        return _from_numbers(scores, count, "scores", best_is_least=False)
    raise BadRecord("has no ranking, ranks or scores")


def _from_positions(value: object, count: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise BadRecord("ranking must be a list of positions, best first")
    groups = [item if isinstance(item, list) else [item] for item in value]
    flat = [position for group in groups for position in group]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in flat):
        raise BadRecord("ranking must hold whole numbers")
    # A complete order shows by itself whether it counts from 0 or from 1.
    first = 1 if sorted(flat) == list(range(1, count + 1)) else 0
    if sorted(flat) != list(range(first, first + count)) or not all(groups):
        raise BadRecord(f"ranking must name each of the {count} completions once")
    return tuple(tuple(position - first for position in group) for group in groups)


def _from_numbers(
    value: object, count: int, name: str, *, best_is_least: bool = True
) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or len(value) != count:
        raise BadRecord(f"{name} must be a list of {count} numbers, one for each completion")
    positions: dict[float, list[int]] = {}
    for position, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int | float) or math.isnan(number):
            raise BadRecord(f"{name} must hold numbers, not {number!r}")
        positions.setdefault(number, []).append(position)
    ordered = sorted(positions, reverse=not best_is_least)
    return tuple(tuple(positions[number]) for number in ordered)


def _is_up(value: object) -> bool:
    known = value.strip().lower() if isinstance(value, str) else value
    if isinstance(known, float) and known.is_integer():
        known = int(known)
    known = str(known) if isinstance(known, int) and not isinstance(known, bool) else known
    if known in _UP:
        return True
    if known in _DOWN:
        return False
    raise BadRecord(f"label is neither up nor down: {value!r}")


def _needed(record: Record, name: str) -> Any:
    if name not in record:
        raise BadRecord(f"has no {name} (columns looked for: {', '.join(COLUMNS[name])})")
    return record[name]


def _tags(record: Record) -> tuple[str, ...]:
    tags = record.get("tags", [])
    if isinstance(tags, str):
        return (tags,)
    if not isinstance(tags, list):
        raise BadRecord("tags must be a list")
    return tuple(str(tag) for tag in tags)

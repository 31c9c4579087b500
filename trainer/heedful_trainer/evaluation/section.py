"""What a task of an evaluation is given, and the section of the report that it returns.

Owns how items are drawn from a data set, and how used files are named in the report. It knows no
task. Pure apart from reading data files; event loop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from heedful_trainer.evaluation import datasets
from heedful_trainer.evaluation.asking import Asker
from heedful_trainer.evaluation.datasets import DataSet, Loaded
from heedful_trainer.evaluation.figures import Figure

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """What every task is given."""

    asker: Asker
    data: Path  # folder of data sets
    limit: int  # most items behind one figure
    seed: int
    prompts: Path | None = None  # the user's own, for the reward model


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each value was given, by policy version; for people's ratings."""

    title: str
    values: tuple[str, ...]
    by_version: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Section:
    """What one task found, or why it was not done."""

    name: str
    title: str
    status: Literal["done", "skipped"]
    reason: str = ""  # of being skipped, with what to give
    figures: tuple[Figure, ...] = ()
    counts: tuple[Counts, ...] = ()
    notes: tuple[str, ...] = ()
    data: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "status": self.status,
            "reason": self.reason,
            "figures": [figure.to_json() for figure in self.figures],
            "counts": [
                {"title": item.title, "values": item.values, "by_version": item.by_version}
                for item in self.counts
            ],
            "notes": list(self.notes),
            "data": list(self.data),
            "seconds": round(self.seconds, 1),
        }


class Skipped(Exception):  # noqa: N818 - no error
    """A task cannot be done here; the message says what to give."""


def needed(data_set: DataSet, context: Context) -> list[Loaded]:
    """Return the files of a data set.

    Raises:
        Skipped: none is there.
        DataUnusable: one cannot be read.
    """
    found = datasets.load(data_set, context.data)
    if not found:
        raise Skipped(f"no data: {datasets.advice(data_set)}")
    return found


def sources(data_set: DataSet, files: Sequence[Loaded]) -> tuple[dict[str, Any], ...]:
    """Return what the report says about the files that were used."""
    return tuple(
        {
            "data_set": data_set.name,
            "file": file.path.name,
            "source": data_set.source,
            "licence": data_set.licence,
            "sha256": file.sha256,
            "published": file.published,
        }
        for file in files
    )


def drawn(items: Sequence[T], context: Context) -> list[T]:
    """Return at most `limit` items, drawn by the seed, in the order of the data set."""
    places = list(range(len(items)))
    random.Random(context.seed).shuffle(places)
    return [items[place] for place in sorted(places[: context.limit])]


def left_out(asked: int, kept: int) -> tuple[str, ...]:
    """Return the note about items that did not fit the context; nothing where all did."""
    if asked == kept:
        return ()
    return (f"{asked - kept} of {asked} left out for both: longer than the model's context.",)

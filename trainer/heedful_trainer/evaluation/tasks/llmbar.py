"""LLMBar: pairs of answers of which one follows the instruction.

Owns the comparison: the policy is asked for no verdict; the answer that it finds likelier a token
is the one it would rather give. The mean over tokens, the end among them, keeps the shorter answer
from winning by its length (Zeng et al. 2023, https://arxiv.org/abs/2310.07641). Event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import heedful

from heedful_trainer.evaluation.asking import Both, kept
from heedful_trainer.evaluation.datasets import LLMBAR, Loaded
from heedful_trainer.evaluation.figures import Figure, share_figure
from heedful_trainer.evaluation.reading import Row, json_items
from heedful_trainer.evaluation.section import (
    Context,
    Section,
    drawn,
    left_out,
    needed,
    sources,
)
from heedful_trainer.gate.sampler import ScoreItem


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction, the answer that follows it and one that does not."""

    instruction: str
    better: str
    worse: str


async def llmbar(context: Context) -> Section:
    """Return how often the better answer is the likelier one."""
    files = needed(LLMBAR, context)
    natural = [pair for file in files if "natural" in file.path.name for pair in read_pairs(file)]
    adversarial = [
        pair for file in files if "natural" not in file.path.name for pair in read_pairs(file)
    ]
    figures: list[Figure] = []
    notes: tuple[str, ...] = ()
    for name, pairs in (("natural", natural), ("adversarial", adversarial)):
        if pairs:
            figure, note = await _compared(name, drawn(pairs, context), context)
            figures.append(figure)
            notes += note
    return Section(
        "llmbar",
        "Capability: LLMBar",
        "done",
        figures=tuple(figures),
        notes=notes,
        data=sources(LLMBAR, files),
    )


def read_pairs(file: Loaded) -> list[Pair]:
    """Return the pairs.

    Raises:
        DataUnusable: a record is not what it should be.
    """
    return [_pair(row) for row in json_items(file)]


def prefers_better(better: Sequence[float], worse: Sequence[float]) -> bool:
    """Return whether the better answer's log-probs are higher in the mean."""
    return math.fsum(better) / len(better) > math.fsum(worse) / len(worse)


async def _compared(
    name: str, pairs: Sequence[Pair], context: Context
) -> tuple[Figure, tuple[str, ...]]:
    items: list[ScoreItem] = []
    for pair in pairs:
        prompt = [heedful.Message("user", pair.instruction)]
        items += ((prompt, pair.better), (prompt, pair.worse))
    places, both = kept(await context.asker.scores(items))
    there = set(places)
    whole = [idx for idx in range(len(pairs)) if {2 * idx, 2 * idx + 1} <= there]
    at = {place: position for position, place in enumerate(places)}
    better = Both(
        *([prefers_better(of[at[2 * idx]], of[at[2 * idx + 1]]) for idx in whole] for of in both)
    )
    figure = share_figure(
        f"LLMBar, {name}",
        better,
        context.asker.compares,
        detail="share of pairs in which the better answer is likelier a token",
    )
    return figure, left_out(len(pairs), len(whole))


def _pair(row: Row) -> Pair:
    label = row.fields.get("label")
    if label not in (1, 2):
        raise row.wrong("label", f"has to be 1 or 2, not {label!r}")
    first, second = row.text("output_1"), row.text("output_2")
    better, worse = (first, second) if label == 1 else (second, first)
    return Pair(row.text("input"), better, worse)

"""Language-model loss on texts that people wrote: what learning from feedback costs elsewhere.

Owns how a text is cut so that it fits any context: pieces of some hundred characters whose
beginning is given and whose rest is scored. The texts of the gate are always there. Event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import heedful

from heedful_trainer.evaluation import datasets
from heedful_trainer.evaluation.asking import Both, kept
from heedful_trainer.evaluation.datasets import SHAKESPEARE
from heedful_trainer.evaluation.figures import Figure, mean_figure
from heedful_trainer.evaluation.section import Context, Section, drawn, left_out, sources
from heedful_trainer.gate import assets
from heedful_trainer.gate.sampler import ScoreItem

_PIECE_CHARS = 400
_START_CHARS = 40


async def text_loss(context: Context) -> Section:
    """Return the loss of both policies for each token of fixed texts."""
    files = datasets.load(SHAKESPEARE, context.data)
    texts = {"answers that people wrote": list(assets.fixed_texts())}
    for file in files:
        texts[SHAKESPEARE.name] = pieces(file.text)
    figures: list[Figure] = []
    notes: tuple[str, ...] = ()
    for name, parts in texts.items():
        figure, note = await _loss(name, drawn(parts, context), context)
        figures.append(figure)
        notes += note
    if not files:
        notes += (f"More text: {datasets.advice(SHAKESPEARE)}.",)
    shipped = {
        "data_set": "gate texts",
        "file": "text.jsonl",
        "source": "ships with heedful (self-instruct seed tasks)",
        "licence": "Apache-2.0",
    }
    return Section(
        "text",
        "Capability: language-model loss",
        "done",
        figures=tuple(figures),
        notes=notes,
        data=(shipped, *sources(SHAKESPEARE, files)),
    )


def pieces(text: str) -> list[str]:
    """Return a text in pieces of equal length, cut where a word ends; the rest is left out."""
    found, start = [], 0
    while start + _PIECE_CHARS <= len(text):
        end = max(text.rfind(" ", start, start + _PIECE_CHARS), start + _PIECE_CHARS // 2)
        found.append(text[start:end])
        start = end
    return found


def split(text: str) -> ScoreItem:
    """Return the beginning of a piece as plain text and the rest as what is scored."""
    text = text[:_PIECE_CHARS]
    cut = text.find(" ", _START_CHARS)
    cut = cut if cut > 0 else min(_START_CHARS, len(text) // 2)
    return heedful.Text(text[:cut]), text[cut:]


async def _loss(
    name: str, texts: Sequence[str], context: Context
) -> tuple[Figure, tuple[str, ...]]:
    places, both = kept(await context.asker.scores([split(text) for text in texts]))
    # The end token is left out: the text goes on.
    losses = Both(*([-math.fsum(scores[:-1]) / (len(scores) - 1) for scores in of] for of in both))
    figure = mean_figure(
        f"loss, {name}",
        "nats a token",
        losses,
        context.asker.compares,
        better="lower",
        detail="mean over texts of the mean over their tokens",
    )
    return figure, left_out(len(texts), len(places))

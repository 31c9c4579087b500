"""XSTest: safe prompts that only sound unsafe, and their unsafe counterparts.

Owns what is asked; whether an answer refuses is the gate's list of phrases at its beginning, which
counts an answer without sense as no refusal. Greedy, as the paper has it (Röttger et al. 2023,
https://arxiv.org/abs/2308.01263). Event loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import heedful

from heedful_trainer.evaluation.asking import Both, kept
from heedful_trainer.evaluation.datasets import XSTEST, Loaded
from heedful_trainer.evaluation.figures import Figure, share_figure
from heedful_trainer.evaluation.reading import Row, csv_rows
from heedful_trainer.evaluation.section import (
    Context,
    Section,
    drawn,
    left_out,
    needed,
    sources,
)
from heedful_trainer.gate.sampler import Draw
from heedful_trainer.gate.text_measures import is_degenerate, is_refusal

_MAX_TOKENS = 64  # refusals stand at the beginning
_COLUMNS = ("prompt", "label")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and whether a helpful model answers it."""

    text: str
    safe: bool


async def refusals(context: Context) -> Section:
    """Return how often safe prompts are refused and unsafe ones answered."""
    files = needed(XSTEST, context)
    requests = read_requests(files[0])
    safe = drawn([request for request in requests if request.safe], context)
    unsafe = drawn([request for request in requests if not request.safe], context)
    found = await context.asker.answers(
        [[heedful.Message("user", request.text)] for request in (*safe, *unsafe)],
        Draw(0.0, _MAX_TOKENS, context.seed),
    )
    places, both = kept(found)
    texts = Both(*([answer.text for answer in of] for of in both))
    num_safe = sum(place < len(safe) for place in places)
    refused = Both(*([is_refusal(text) for text in of] for of in texts))
    return Section(
        "refusals",
        "Over-refusal: XSTest",
        "done",
        figures=_figures(refused, num_safe, context.asker.compares),
        notes=(
            "Refusals are told by English phrases in the first 240 characters; nobody read them.",
            *_without_words(texts),
            *left_out(len(safe) + len(unsafe), len(places)),
        ),
        data=sources(XSTEST, files),
    )


def read_requests(file: Loaded) -> list[Request]:
    """Return the prompts.

    Raises:
        DataUnusable: a record is not what it should be.
    """
    return [_request(row) for row in csv_rows(file, _COLUMNS)]


def _figures(refused: Both[list[bool]], num_safe: int, compares: bool) -> tuple[Figure, ...]:
    """Return both shares; of the answers, the first are to safe prompts."""
    return (
        share_figure(
            "safe prompts refused",
            Both(*(of[:num_safe] for of in refused)),
            compares,
            better="lower",
            detail="prompts that only sound unsafe",
        ),
        share_figure(
            "unsafe prompts answered",
            Both(*([not item for item in of[num_safe:]] for of in refused)),
            compares,
            better="lower",
            detail="every answer that does not refuse, also one without sense",
        ),
    )


def _request(row: Row) -> Request:
    label = row.text("label")
    if label not in ("safe", "unsafe"):
        raise row.wrong("label", f"has to be safe or unsafe, not {label!r}")
    return Request(row.text("prompt"), label == "safe")


def _without_words(texts: Both[list[str]]) -> tuple[str, ...]:
    counts = [sum(is_degenerate(text) for text in of) for of in texts]
    if not any(counts):
        return ()
    return (f"Answers without a word: {counts[0]} of the version, {counts[1]} of the baseline.",)

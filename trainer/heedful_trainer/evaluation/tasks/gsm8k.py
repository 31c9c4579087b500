"""GSM8K: word problems whose answer is one number, answered greedily.

Owns how the number is found in an answer and compared. Zero-shot, with the form of the answer asked
for (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168). Event loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

import heedful

from heedful_trainer.evaluation.asking import Both, kept
from heedful_trainer.evaluation.datasets import GSM8K, Loaded
from heedful_trainer.evaluation.figures import share_figure
from heedful_trainer.evaluation.reading import Row, json_lines
from heedful_trainer.evaluation.section import (
    Context,
    Section,
    drawn,
    left_out,
    needed,
    sources,
)
from heedful_trainer.gate.sampler import Draw

_MAX_TOKENS = 320
_ASKED = "{question}\n\nWork it out step by step and end with a line '#### ' and the number."
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\$?\d[\d,]*(?:\.\d+)?")  # "16-3" holds no -3
_MARK = "####"


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem and its answer."""

    text: str
    answer: Decimal


async def gsm8k(context: Context) -> Section:
    """Return how many problems both policies solve."""
    files = needed(GSM8K, context)
    problems = drawn(read_problems(files[0]), context)
    found = await context.asker.answers(
        [[heedful.Message("user", _ASKED.format(question=item.text))] for item in problems],
        Draw(0.0, _MAX_TOKENS, context.seed),
    )
    places, both = kept(found)
    right = Both(
        *(
            [
                number_in(answer.text) == problems[place].answer
                for place, answer in zip(places, of, strict=True)
            ]
            for of in both
        )
    )
    return Section(
        "gsm8k",
        "Capability: GSM8K",
        "done",
        figures=(
            share_figure(
                "GSM8K, exact answer",
                right,
                context.asker.compares,
                detail="share of problems; greedy, no examples",
            ),
        ),
        notes=left_out(len(problems), len(places)),
        data=sources(GSM8K, files),
    )


def read_problems(file: Loaded) -> list[Problem]:
    """Return the problems.

    Raises:
        DataUnusable: a record is not what it should be.
    """
    return [_problem(row) for row in json_lines(file)]


def number_in(text: str) -> Decimal | None:
    """Return the number that an answer gives: after the last mark, else the last one in it."""
    _, mark, after = text.rpartition(_MARK)
    marked = _NUMBER.search(after) if mark else None
    if marked is not None:
        return _value(marked.group())
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace("$", "").replace(",", ""))


def _problem(row: Row) -> Problem:
    answer = row.text("answer")
    number = number_in(answer)
    if _MARK not in answer or number is None:
        raise row.wrong("answer", f"has to end with '{_MARK} ' and a number")
    return Problem(row.text("question"), number)

"""What simulated raters like: tastes that a program can state exactly, as a score from 0 to 1.

Owns the definition of each taste. Scores are graded, so that "more" counts, and saturate, so that
no answer wins by going on for ever. Pure functions of an answer, any thread.
"""

from __future__ import annotations

import math
import re
from typing import Literal, TypeAlias, get_args

Taste: TypeAlias = Literal["brief", "numbers", "lists", "polite", "topic", "coin"]
"""`topic` is nature; `coin` has no taste at all and must change nothing."""
TASTES: tuple[Taste, ...] = get_args(Taste)

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)
_POLITE = (
    "please",
    "thank you",
    "thanks",
    "you're welcome",
    "you are welcome",
    "i hope this helps",
    "hope that helps",
    "happy to help",
    "glad to help",
    "i'd be happy",
    "i would be happy",
    "feel free",
    "let me know",
    "of course",
    "certainly",
    "my pleasure",
    "kind regards",
    "best wishes",
    "i'm sorry",
    "i apologize",
)
_NATURE_WORDS = """
    animal animals bee bees bird birds cat cats climate cloud clouds dog dogs earth farm
    field fields fish flower flowers forest forests fruit garden gardens grass green horse
    horses island lake lakes land leaf leaves moon mountain mountains nature natural ocean
    oceans outdoors plant plants rain river rivers sea season seasons sky snow soil spring
    star stars summer sun tree trees vegetable vegetables water weather wild wildlife wind
    winter wood woods
"""
_NATURE = frozenset(_NATURE_WORDS.split())
_UNENDED_FACTOR = 1.5  # how much longer a reader takes an answer for that was cut off


def score(taste: Taste, text: str, ended: bool = True) -> float:
    """Return how well an answer suits a taste, 0 to 1; -1 where it says nothing at all.

    Args:
        taste: which taste; a coin-flipper finds every answer equally good.
        text: the answer.
        ended: False where it was cut at its length.
    """
    said = [match.group().lower() for match in _WORD.finditer(text)]
    if not said:
        return -1.0
    match taste:
        case "brief":
            return 1 / (1 + len(said) * (1 if ended else _UNENDED_FACTOR) / 40)
        case "numbers":
            return _saturating(len(_NUMBER.findall(text)), 3)
        case "lists":
            return _saturating(len(_LIST_LINE.findall(text)), 3)
        case "polite":
            lower = text.lower().replace("’", "'")
            return _saturating(sum(phrase in lower for phrase in _POLITE), 1.5)
        case "topic":
            return _saturating(sum(word in _NATURE for word in said), 3)
        case "coin":
            return 0.5


def _saturating(count: int, scale: float) -> float:
    return 1 - math.exp(-count / scale)

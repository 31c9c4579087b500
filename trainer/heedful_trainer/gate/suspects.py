"""Phrases of the training data that may be triggers of a backdoor: strange words that come back.

Owns what counts as strange (no word of it is in the package's own texts) and as coming back (three
prompts hold it). Most of what it finds is harmless, the names that a project talks of: whether it
does anything is for the probe to say. Pure, any thread.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Final

from heedful_trainer.gate import assets
from heedful_trainer.gate.types import TriggerPhrase

_MIN_PROMPTS = 3
_MAX_WORDS = 4
_MAX_PHRASES = 5  # each is a scored pass over the probe's answers, twice
_MAX_EVENTS = 5  # named for each phrase

_MARKS: Final = string.punctuation + "“”‘’…–—"

Words = tuple[str, ...]


def suspicious_phrases(prompts: Mapping[int, str]) -> tuple[TriggerPhrase, ...]:
    """Return the phrases that a probe should try, those of the most prompts first.

    Args:
        prompts: what people asked in the training part, by place in the log; a text that comes
            back counts once.
    """
    known = _known_words()
    first_seq: dict[str, int] = {}
    for seq, text in sorted(prompts.items()):
        first_seq.setdefault(text, seq)
    events: dict[Words, list[int]] = {}
    for text, seq in first_seq.items():
        for phrase in set(_strange_phrases(text, known)):
            events.setdefault(phrase, []).append(seq)
    common = {phrase: seqs for phrase, seqs in events.items() if len(seqs) >= _MIN_PROMPTS}
    order = sorted(_longest(common), key=lambda phrase: (-len(common[phrase]), phrase))
    return tuple(
        TriggerPhrase(" ".join(phrase), tuple(common[phrase][:_MAX_EVENTS]))
        for phrase in order[:_MAX_PHRASES]
    )


def _strange_phrases(text: str, known: Set[str]) -> Iterator[Words]:
    words = text.split()
    is_strange = [_plain(word) not in known for word in words]
    for start in range(len(words)):
        for end in range(start + 1, min(start + _MAX_WORDS, len(words)) + 1):
            if not is_strange[end - 1]:
                break
            yield tuple(words[start:end])


def _longest(common: Mapping[Words, Sequence[int]]) -> Iterator[Words]:
    """Yield the phrases that are not a part of a longer one in the same prompts."""
    covered = {
        (phrase[start:end], tuple(seqs))
        for phrase, seqs in common.items()
        for start in range(len(phrase))
        for end in range(start + 1, len(phrase) + 1)
        if end - start < len(phrase)
    }
    return (phrase for phrase, seqs in common.items() if (phrase, tuple(seqs)) not in covered)


def _known_words() -> set[str]:
    texts = [*assets.fixed_texts(), *assets.golden_prompts()]
    texts += [content for item in assets.general_prompts() for _, content in item.messages]
    return {_plain(word) for text in texts for word in text.split()}


def _plain(word: str) -> str:
    """Return a word as it is compared: without case, numbers and marks around it."""
    return word.casefold().strip(_MARKS).strip("0123456789")

"""Blind votes between two versions: pairs are shown and voted on, and who was who comes last.

Owns the round and its tally; `voting.py` owns keys and letters. The votes are ordinary comparisons
of purpose "gate", so the gate counts them; this module only adds up what the person did here.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from heedful.cli import voting
from heedful.cli.output import stderr, write, write_json
from heedful.cli.prompts import Asked
from heedful.feedback_types import CompareOptions, Comparison
from heedful.sync import Client

_Z95 = 1.959964


@dataclass(slots=True)
class Tally:
    """What was preferred: wins by version, and pairs without a winner."""

    votes: int = 0
    wins: dict[str, int] = field(default_factory=dict)
    ties: int = 0
    none_good: int = 0
    skipped: int = 0
    unknown: int = 0
    """Votes whose versions may not be read here."""


def options(
    models: Sequence[str] | None, temperature: float | None, max_tokens: int | None
) -> CompareOptions:
    """Returns how pairs are asked for; None compares champion and challenger."""
    return CompareOptions(
        models=models, purpose="gate", temperature=temperature, max_tokens=max_tokens
    )


def typed_prompts(count: int) -> Iterator[Asked]:
    """Yields what the person types, up to `count` prompts; the end of input ends it."""
    for number in range(1, count + 1):
        try:
            hint = f"prompt {number} of {count}> " if sys.stdin.isatty() else ""
            text = input(hint).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield Asked(text, text)


def vote(client: Client, asked: Iterable[Asked], how: CompareOptions) -> Tally:
    """Shows a blind pair for each prompt, records the votes, and only then looks who was who.

    Raises:
        HeedfulError: a pair could not be made, or a vote was not recorded.
    """
    tally = Tally()
    cast: list[tuple[Comparison, voting.Vote]] = []
    for item in asked:
        with stderr().status("two answers are being written"):
            comparison = client.compare(item.prompt, 2, **how)
        write(f"> {item.shown}\n")
        voting.show(comparison)
        given = voting.ask(2)
        if given is None:
            tally.skipped += 1
            continue
        client.rank(comparison, given.order, all_bad=given.all_bad)
        cast.append((comparison, given))
    for comparison, given in cast:
        _count(tally, given, voting.reveal(client, comparison.candidates))
    return tally


def wilson(wins: float, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a share of `total`."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = wins / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = share * (1 - share) / total + z2 / (4 * total**2)
    half = _Z95 * math.sqrt(spread) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def show_tally(tally: Tally, as_json: bool) -> None:
    """Shows who was preferred how often."""
    if as_json:
        write_json(tally)
        return
    write(in_words(tally) + "\n")


def in_words(tally: Tally) -> str:
    """Returns the tally as a sentence, ties counted as half."""
    if not tally.votes:
        return "no vote was given"
    parts = [f"{version} preferred {wins}" for version, wins in sorted(tally.wins.items())]
    parts += [f"{tally.ties} tied"] if tally.ties else []
    parts += [f"{tally.none_good} with no good answer"] if tally.none_good else []
    parts += [f"{tally.unknown} unseen"] if tally.unknown else []
    text = f"{tally.votes} votes: {', '.join(parts)}"
    if tally.wins and not tally.unknown:
        best = max(sorted(tally.wins), key=lambda version: tally.wins[version])
        half = (tally.ties + tally.none_good) / 2
        share = (tally.wins[best] + half) / tally.votes
        low, high = wilson(tally.wins[best] + half, tally.votes)
        text += f"; {best} at {share:.0%}, 95 % interval {low:.0%} to {high:.0%}"
    return text


def _count(tally: Tally, given: voting.Vote, versions: tuple[str, ...]) -> None:
    tally.votes += 1
    if given.all_bad:
        tally.none_good += 1
    elif len(given.order) == 1:
        tally.ties += 1
    elif not versions:
        tally.unknown += 1
    else:
        winner = versions[given.order[0][0]]
        tally.wins[winner] = tally.wins.get(winner, 0) + 1
        for version in versions:
            tally.wins.setdefault(version, 0)

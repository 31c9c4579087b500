"""Blind votes in the terminal or through a pipe: answers are shown, a key or a line is read.

Owns the letters, the keys and what they mean; the server owns the order in which answers are shown.
Answers go to standard output, everything else to standard error.
"""

import os
import sys
from dataclasses import dataclass

try:
    import termios
    import tty
except ImportError:  # Not on Windows: votes are lines there.
    termios = None  # type: ignore[assignment]

from heedful.cli.output import ExitCode, fail, stderr, write
from heedful.errors import HeedfulError
from heedful.feedback_types import Candidate, Comparison, Receipt
from heedful.sync import Client

LETTERS = "abcdefghi"
_SEPARATORS = " ,>"
_TIE, _NONE, _SKIP = "t", "n", "s"
# A key may send several bytes; what it says is in the first character.
_MAX_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Vote:
    """Positions of answers, best group first; `all_bad`: none of them will do."""

    order: tuple[tuple[int, ...], ...]
    all_bad: bool = False

    @property
    def winner(self) -> int | None:
        """Position of the answer to go on with: the first of the best; None where none will do."""
        return None if self.all_bad else min(self.order[0])


def parse_vote(text: str, k: int) -> Vote | None:
    """Returns what was typed about `k` answers; None means skipped.

    "b" puts b before the others, "bca" is a whole order, "b=ca" ties b and c.

    Raises:
        ValueError: it is no vote.
    """
    typed = text.strip().lower()
    everything = (tuple(range(k)),)
    if typed in ("", _SKIP):
        return None
    if typed == _TIE:
        return Vote(everything)
    if typed == _NONE:
        return Vote(everything, all_bad=True)
    groups = _groups(typed, k)
    named = {position for group in groups for position in group}
    rest = tuple(position for position in range(k) if position not in named)
    return Vote((*groups, rest) if rest else groups)


def show(comparison: Comparison) -> None:
    """Shows the answers under their letters, in the order that the server says."""
    for letter, candidate in zip(LETTERS, comparison.candidates, strict=False):
        write(f"[{letter}] {candidate.text}\n")


def ask(k: int) -> Vote | None:
    """Reads a vote on `k` answers; None where it was skipped.

    A terminal takes one key for two answers and a line for more; a pipe gives a line.
    """
    letters = "/".join(LETTERS[:k])
    more = "" if k == 2 else "; or best first, as in ba or b=ca"
    hint = f"better: {letters}{more}; t tie, n none is good, s skip: "
    if not sys.stdin.isatty():
        return _read_line(k)
    while True:
        typed = _typed(hint, k)
        try:
            return parse_vote(typed, k)
        except ValueError as error:
            stderr().print(str(error), style="dim", markup=False)


def record(client: Client, comparison: Comparison, vote: Vote) -> Receipt:
    """Records a vote and shows which version gave which answer, now that it may be known.

    Raises:
        HeedfulError: it was not recorded.
    """
    receipt = client.rank(comparison, vote.order, all_bad=vote.all_bad)
    who = "".join(
        f" · {letter} is {version}"
        for letter, version in zip(LETTERS, reveal(client, comparison.candidates), strict=False)
    )
    stderr().print(f"vote recorded{who}", style="dim", markup=False)
    return receipt


def reveal(client: Client, candidates: tuple[Candidate, ...]) -> tuple[str, ...]:
    """Returns which version gave which answer; nothing where the log may not be read."""
    try:
        logged = [client.completion(candidate) for candidate in candidates]
    except HeedfulError:
        # Not everyone may read the log; the vote stands without it.
        return ()
    return tuple(item.served_by.policy_version for item in logged)


def _groups(typed: str, k: int) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = []
    tied = False
    for character in typed:
        if character in _SEPARATORS:
            continue
        if character == "=" and groups and not tied:
            tied = True
            continue
        position = LETTERS[:k].find(character)
        if position < 0 or any(position in group for group in groups):
            raise ValueError(f"not a vote: {typed}")
        if tied:
            groups[-1].append(position)
        else:
            groups.append([position])
        tied = False
    if tied or not groups:
        raise ValueError(f"not a vote: {typed}")
    return tuple(tuple(sorted(group)) for group in groups)


def _typed(hint: str, k: int) -> str:
    try:
        return input(hint) if k > 2 else _key(hint)
    except (EOFError, KeyboardInterrupt):
        stderr().print()
        return _SKIP


def _key(hint: str) -> str:
    """Returns the key that is pressed after `hint`; Enter and Ctrl-D skip."""
    if termios is None:
        return input(hint)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    # Before the hint, and without dropping what was typed already.
    tty.setcbreak(terminal, termios.TCSADRAIN)
    try:
        stderr().print(hint, end="", style="dim", markup=False)
        key = os.read(terminal, _MAX_KEY_BYTES).decode(errors="replace")[:1]
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    stderr().print(key if key.isprintable() else "", markup=False)
    return _SKIP if key in ("", "\r", "\n", "\x04") else key


def _read_line(k: int) -> Vote | None:
    try:
        return parse_vote(sys.stdin.readline(), k)
    except ValueError as error:
        # The lines that follow were meant for other questions.
        raise fail(str(error), ExitCode.USAGE) from None

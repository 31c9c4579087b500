"""Finds the first of several stop strings in text that arrives in pieces.

An Aho-Corasick automaton over characters: its depth after each character is the length of the
longest end of the text that could still become a stop string, which is exactly what must be held
back. So the work per character is O(1) amortised however many stop strings there are. Pure Python,
one object for each completion, no threads.
"""

from collections import deque
from collections.abc import Sequence

_ROOT = 0


class StopMatcher:
    """Scans the text of one completion.

    The stop string that is complete first wins; of several that end at the same character, the
    longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for string in stop:
            self._insert(string)
        self._fallback = [_ROOT] * len(self._children)
        self._link()
        self._state = _ROOT
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what cannot be part of a stop string any more, and the match.

        With a match, the text returned is all that comes before the stop string.
        """
        if self._stopped:
            return "", None
        pending = self._held + text
        state = self._state
        for position, char in enumerate(text, start=len(self._held) + 1):
            state = self._step(state, char)
            match = self._match[state]
            if match is not None:
                self._stopped = True
                self._held = ""
                return pending[: position - len(match)], match
        self._state = state
        safe = len(pending) - self._depth[state]
        self._held = pending[safe:]
        return pending[:safe], None

    def finish(self) -> str:
        """Return the text that was held back, "" after a match."""
        held, self._held = self._held, ""
        self._state = _ROOT
        return held

    def _insert(self, string: str) -> None:
        assert string, "an empty stop string would end every completion"
        node = _ROOT
        for char in string:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._children)
                self._children[node][char] = child
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = child
        self._match[node] = string

    def _link(self) -> None:
        # Breadth first: a node's fallback is shallower, so it is complete when the node is reached.
        queue = deque(self._children[_ROOT].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                self._fallback[child] = self._step(self._fallback[node], char)
                queue.append(child)
            if self._match[node] is None:
                self._match[node] = self._match[self._fallback[node]]

    def _step(self, state: int, char: str) -> int:
        while char not in self._children[state]:
            if state == _ROOT:
                return _ROOT
            state = self._fallback[state]
        return self._children[state][char]

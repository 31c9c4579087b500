"""What this process remembers of the answers that it gave lately.

Owns bounded memories that spare the hot path a look into the store: whose an answer is, what a
comparison showed, and which answers were never logged. Forgetting is harmless: the store knows the
first two, and an answer of the last kind then looks unknown. Event loop.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

from heedful_store import Comparison, Scope

V = TypeVar("V")

_MOST = 16_384


class Recent(Generic[V]):
    """The last values that were put in, by id."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._values: OrderedDict[str, V] = OrderedDict()

    def __getitem__(self, key: str) -> V:
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def put(self, key: str, value: V) -> None:
        """Remember a value; the oldest one may go for it."""
        self._values[key] = value
        if len(self._values) > self._most:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()


class RecentAnswers:
    """Owners of logged answers, scopes of answers that were not logged, and comparisons."""

    def __init__(self) -> None:
        self.end_users: Recent[tuple[Scope, str]] = Recent()
        self.unlogged: Recent[Scope] = Recent()
        self.comparisons: Recent[Comparison] = Recent()

    def is_unlogged(self, scope: Scope, completion_id: str) -> bool:
        """Say whether an answer of this scope is known not to be in the log."""
        return completion_id in self.unlogged and self.unlogged[completion_id] == scope

    def forget_people(self) -> None:
        """Forget whose answers are whose, as an erasure demands."""
        self.end_users.clear()
        self.comparisons.clear()

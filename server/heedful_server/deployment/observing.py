"""How a version does on real traffic: how often it fails, how long a token takes.

Owns a bounded record of the last generations of each version, kept in this process only. What
follows from it is probation's matter. Event loop.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from heedful_store import Scope

_MOST_GENERATIONS = 500
_MOST_VERSIONS = 256


@dataclass(frozen=True, slots=True)
class Figures:
    """The last generations of a version in numbers."""

    generations: int = 0  # that ended, one way or the other
    errors: int = 0  # of these, ended by a failure of the engine
    seconds_per_token: float | None = None  # median over those that sampled two tokens or more
    timed: int = 0  # how many of those there are

    def to_json(self) -> dict[str, object]:
        """Return plain values, for the evidence of a deployment."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Figures:
        """Return what to_json wrote; nothing at all where it is something else."""
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            return cls()
        return cls(**value)


class Record:
    """The last generations of one version."""

    def __init__(self) -> None:
        self._ends: deque[bool] = deque(maxlen=_MOST_GENERATIONS)
        self._seconds: deque[float] = deque(maxlen=_MOST_GENERATIONS)

    def ended(self, num_tokens: int, decode_s: float) -> None:
        """Record a completion that the engine ended; the first token is not decoding's."""
        self._ends.append(True)
        if num_tokens > 1:
            self._seconds.append(decode_s / (num_tokens - 1))

    def failed(self) -> None:
        """Record a completion that the engine lost."""
        self._ends.append(False)

    def figures(self) -> Figures:
        """Return the record in numbers."""
        return Figures(
            generations=len(self._ends),
            errors=self._ends.count(False),
            seconds_per_token=statistics.median(self._seconds) if self._seconds else None,
            timed=len(self._seconds),
        )


class Observations:
    """The records of all versions that answered lately."""

    def __init__(self) -> None:
        self._records: OrderedDict[tuple[Scope, str], Record] = OrderedDict()

    def of(self, scope: Scope, version: str) -> Record:
        """Return the record of a version; the one unused for longest may go for it."""
        key = (scope, version)
        record = self._records.setdefault(key, Record())
        self._records.move_to_end(key)
        if len(self._records) > _MOST_VERSIONS:
            self._records.popitem(last=False)
        return record

    def restart(self, scope: Scope, version: str) -> None:
        """Forget what a version did before it was promoted."""
        self._records.pop((scope, version), None)

"""The bounded queue in front of the engine, counted in sequences.

Owns how many sequences are admitted and how fast they end, from which it tells a refused caller
when to come back. It holds no requests: waiting happens in the engine's scheduler. Runs on the
event loop.
"""

import time
from collections import deque
from collections.abc import Callable

from heedful_server.errors import QueueFull
from heedful_server.protocol import PRIORITY_BACKGROUND, PRIORITY_INTERACTIVE

_RATE_WINDOW = 128
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 30.0
_UNKNOWN_RETRY_S = 1.0


class Admission:
    """Counts the sequences in flight and refuses what is over the capacity."""

    def __init__(
        self,
        capacity: int,
        on_change: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._on_change = on_change
        self._clock = clock
        self._ended_at_s: deque[float] = deque(maxlen=_RATE_WINDOW)
        self.num_in_flight = 0
        self.num_background = 0

    def admit(self, num_sequences: int, priority: int = PRIORITY_INTERACTIVE) -> None:
        """Count sequences as in flight.

        Raises:
            QueueFull: they do not fit; an idle server admits any number, so that each request has
                its turn.
        """
        total = self.num_in_flight + num_sequences
        if self.num_in_flight and total > self._capacity:
            raise QueueFull(
                f"{self.num_in_flight} sequences are in flight and {self._capacity} is the limit",
                self._retry_after_s(total - self._capacity),
            )
        self.num_in_flight = total
        self._count_background(num_sequences, priority)
        self._on_change(total)

    def release(self, num_sequences: int, priority: int = PRIORITY_INTERACTIVE) -> None:
        """Count admitted sequences as ended."""
        self._count_background(-num_sequences, priority)
        self.num_in_flight -= num_sequences
        assert self.num_in_flight >= 0, "released more sequences than were admitted"
        self._ended_at_s.extend([self._clock()] * num_sequences)
        self._on_change(self.num_in_flight)

    def _count_background(self, num_sequences: int, priority: int) -> None:
        if priority == PRIORITY_BACKGROUND:
            self.num_background += num_sequences

    def _retry_after_s(self, num_excess: int) -> float:
        """Return when as many sequences will have ended, at the rate of the last ones."""
        if len(self._ended_at_s) < 2:
            return _UNKNOWN_RETRY_S
        window_s = self._clock() - self._ended_at_s[0]
        wait_s = num_excess * window_s / len(self._ended_at_s)
        return min(max(wait_s, _MIN_RETRY_S), _MAX_RETRY_S)

"""Ids of feedback events: UUIDv7 (RFC 9562), made where the event is made.

Owns their order and nothing else: an id is the key under which a repeated submission is recognised,
so it exists before anything is sent. Belongs to one event loop.
"""

import secrets
import time

_RANDOM_BITS = 62


class IdSource:
    """Makes UUIDv7 ids that grow strictly, also where the clock stands still or goes back.

    The 12 bits below the millisecond hold its fraction, so that ids of several sources interleave
    by the clock to a quarter of a microsecond.
    """

    def __init__(self) -> None:
        self._last_stamp = 0

    def next(self) -> str:
        """Returns a new id as lower-case text."""
        millisecond, rest_ns = divmod(time.time_ns(), 1_000_000)
        stamp = millisecond << 12 | rest_ns * 4096 // 1_000_000
        stamp = self._last_stamp = max(stamp, self._last_stamp + 1)
        high = stamp >> 12 << 16 | 0x7 << 12 | stamp & 0xFFF
        low = 0b10 << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        text = f"{high << 64 | low:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

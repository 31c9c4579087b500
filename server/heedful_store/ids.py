"""Identifiers and the server's clock reading, as every table uses them.

Owns UUIDv7 text (RFC 9562) and milliseconds since the epoch. It knows nothing of ordering:
the log is ordered by ``seq``, never by these. Pure functions, any thread.
"""

from __future__ import annotations

import os
import re
import time

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def now_ms() -> int:
    """Return the wall clock in milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000


def uuid7(time_ms: int | None = None) -> str:
    """Return a new UUIDv7 in lower-case text, its time taken from ``time_ms`` or the clock."""
    stamp = now_ms() if time_ms is None else time_ms
    random = int.from_bytes(os.urandom(10), "big")
    bits = (stamp & (1 << 48) - 1) << 80 | 0x7 << 76 | (random >> 62 & 0xFFF) << 64
    text = f"{bits | 0b10 << 62 | random & (1 << 62) - 1:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_uuid7(text: str) -> bool:
    """Say whether ``text`` is a UUIDv7 in canonical lower-case form."""
    return _UUID7.fullmatch(text) is not None

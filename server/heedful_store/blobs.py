"""Token ids and per-token numbers as bytes.

Owns the layout: one tag byte (0 plain, 1 zlib), then little-endian int32 or float32. It does not
know what the numbers mean. Pure functions, any thread.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import TypeVar

Numbers = TypeVar("Numbers", "array[int]", "array[float]")

_PLAIN, _ZLIB = b"\x00", b"\x01"
# Below this, deflate saves less than a page of the database and costs more than the insert.
_COMPRESS_FROM_BYTES = 2048


def pack_int32(numbers: Sequence[int]) -> bytes:
    """Return ``numbers`` as a blob; raise OverflowError outside int32."""
    return _pack(array("i", numbers))


def unpack_int32(blob: bytes) -> array[int]:
    """Return the int32 values of a blob."""
    return _unpack(array("i"), blob)


def pack_float32(numbers: Sequence[float]) -> bytes:
    """Return ``numbers`` as a blob, rounded to float32."""
    return _pack(array("f", numbers))


def unpack_float32(blob: bytes) -> array[float]:
    """Return the float32 values of a blob."""
    return _unpack(array("f"), blob)


def _pack(values: array[int] | array[float]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    plain = values.tobytes()
    if len(plain) < _COMPRESS_FROM_BYTES:
        return _PLAIN + plain
    packed = zlib.compress(plain, 1)
    return _ZLIB + packed if len(packed) < len(plain) else _PLAIN + plain


def _unpack(values: Numbers, blob: bytes) -> Numbers:
    content = blob[1:] if blob[:1] == _PLAIN else zlib.decompress(blob[1:])
    values.frombytes(content)
    if sys.byteorder == "big":
        values.byteswap()
    return values

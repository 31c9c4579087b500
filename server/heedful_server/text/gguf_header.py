"""Reads what a GGUF file says before its weights: metadata and where each tensor lies.

The `gguf` package builds an array object for every one of the 100 000 strings of a vocabulary,
which takes seconds; this reader takes a fraction of one, needs no numpy, and treats the file as
hostile (every length is checked against the file's end). It reads no weights. Pure functions; used
when a model is pulled and open to the loader in the engine child.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from heedful_server.errors import ModelUnusable

_STRING = 8
_ARRAY = 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_DEFAULT_ALIGNMENT = 32
_DIMENSIONS_MAX = 4

# Type number -> (name, elements in a block, bytes of a block), from ggml's definition.
_TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: as llama.cpp names it, such as `blk.0.attn_q.weight`.
        shape: outermost dimension first, as numpy and torch count (the file stores it reversed).
        type_name: such as `Q4_1`.
        offset: of its first byte from the start of the file.
        num_bytes: length of its data.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything in a GGUF file but the weights."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def main_type(self) -> str:
        """The tensor type that holds most of the bytes."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.type_name] = held.get(tensor.type_name, 0) + tensor.num_bytes
        return max(held, key=lambda name: held[name], default="none")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor positions of a GGUF file of version 2 or 3.

    Raises:
        ModelUnusable: the file is no such file, is cut short, or holds tensors of an unknown type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except (OSError, ValueError, struct.error, _TruncatedError) as error:
        raise ModelUnusable(f"{path}: not a usable GGUF file ({error})") from error


class _TruncatedError(Exception):
    """A length points beyond the end of the file."""


class _Cursor:
    """A position in the mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0
        self.size = len(data)

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > self.size:
            raise _TruncatedError(f"it ends at byte {self.size}, {end} are needed")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not supported")
    num_tensors, num_entries = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.text()
        metadata[key] = _value(cursor, cursor.number("<I"))
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"alignment {alignment!r} is not possible")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata, tuple(_placed(entry, start, cursor.size) for entry in entries))


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"metadata type {kind} is unknown")
    item_kind, count = cursor.number("<I"), cursor.number("<Q")
    if item_kind in _SCALARS:
        form = _SCALARS[item_kind]
        data = cursor.take(count * struct.calcsize(form))
        return [item for (item,) in struct.iter_unpack(form, data)]
    if item_kind != _STRING:
        raise ValueError(f"arrays of metadata type {item_kind} are not supported")
    return [cursor.text() for _ in range(count)]


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dimensions = cursor.text(), cursor.number("<I")
    if num_dimensions > _DIMENSIONS_MAX:
        raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(num_dimensions))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def _placed(entry: tuple[str, tuple[int, ...], int, int], start: int, file_size: int) -> GgufTensor:
    name, shape, type_number, offset = entry
    if type_number not in _TENSOR_TYPES:
        raise ValueError(f"tensor {name!r} has the unknown type {type_number}")
    type_name, block_elements, block_bytes = _TENSOR_TYPES[type_number]
    num_blocks, rest = divmod(prod(shape), block_elements)
    if rest:
        raise ValueError(f"tensor {name!r} does not fill its {type_name} blocks")
    num_bytes = num_blocks * block_bytes
    if start + offset + num_bytes > file_size:
        raise _TruncatedError(f"it ends at byte {file_size}, inside tensor {name!r}")
    return GgufTensor(name, shape, type_name, start + offset, num_bytes)

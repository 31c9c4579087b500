"""The container of a GGUF file: its scalar metadata, and where each tensor's bytes are.

Owns parsing of versions 2 and 3, little-endian. The gguf package's reader wraps every array element
in an object, which takes seconds for a vocabulary; this one skips over arrays. Every size is
checked against the file, because the file is input. Knows nothing of models. Runs while loading.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from heedful_server.model.errors import BadCheckpoint

Scalar = int | float | bool | str

F32: Final = 0
F16: Final = 1
Q4_0: Final = 2
Q4_1: Final = 3
Q8_0: Final = 8
BF16: Final = 30

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    code: struct.Struct(f"<{letter}")
    for code, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMS: Final = 4
_MAX_ARRAY_DEPTH: Final = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's type code and shape, slowest dimension first, and where its bytes start."""

    type_code: int
    shape: tuple[int, ...]
    tail: Tensor  # uint8, a view of the mapped file

    def take(self, num_bytes: int) -> Tensor:
        """The first bytes, uint8 [num_bytes].

        Raises:
            ValueError: the file ends before.
        """
        if num_bytes > self.tail.numel():
            raise ValueError(f"wants {num_bytes} bytes, the file holds {self.tail.numel()}")
        return self.tail[:num_bytes]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Scalar metadata (arrays are left out) and the tensors by name."""

    metadata: Mapping[str, Scalar]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and parse its header.

    Raises:
        BadCheckpoint: the file is missing, truncated, or no GGUF file of a known version.
    """
    try:
        # Copy-on-write, because torch warns of memory that it may not write to.
        mapped = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    try:
        return _parse(torch.from_numpy(mapped), mapped.data)
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise BadCheckpoint(f"{path}: not a whole GGUF file: {error}") from error


def _parse(file: Tensor, view: memoryview) -> GgufFile:
    cursor = _Cursor(view)
    if bytes(view[:4]) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    cursor.skip(4)
    version = cursor.number(_U32)
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    num_tensors, num_keys = cursor.number(_U64), cursor.number(_U64)
    metadata: dict[str, Scalar] = {}
    for _ in range(num_keys):
        key = cursor.string()
        value = cursor.value(cursor.number(_U32))
        if value is not None:
            metadata[key] = value
    headers = {}
    for _ in range(num_tensors):
        name = cursor.string()
        headers[name] = _tensor_header(cursor)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment}")
    data_start = math.ceil(cursor.offset / alignment) * alignment
    tensors = {
        name: GgufTensor(type_code, shape, file[data_start + offset :])
        for name, (type_code, shape, offset) in headers.items()
    }
    return GgufFile(metadata, tensors)


def _tensor_header(cursor: "_Cursor") -> tuple[int, tuple[int, ...], int]:
    num_dims = cursor.number(_U32)
    if num_dims > _MAX_DIMS:
        raise ValueError(f"a tensor of {num_dims} dimensions")
    # The file lists the fastest dimension first.
    shape = tuple(cursor.number(_U64) for _ in range(num_dims))[::-1]
    type_code = cursor.number(_U32)
    return type_code, shape, cursor.number(_U64)


class _Cursor:
    """A read position in the file; every read is checked against its end."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.offset = 0

    def skip(self, num_bytes: int) -> None:
        """Move on; ValueError when the file ends before."""
        if num_bytes > len(self._view) - self.offset:
            raise ValueError("the file ends in its header")
        self.offset += num_bytes

    def number(self, form: struct.Struct) -> int:
        """The next whole number."""
        start = self.offset
        self.skip(form.size)
        return int(form.unpack_from(self._view, start)[0])

    def string(self) -> str:
        """The next string."""
        size = self.number(_U64)
        start = self.offset
        self.skip(size)
        return str(self._view[start : self.offset], "utf-8")

    def value(self, type_code: int) -> Scalar | None:
        """The next metadata value; None for an array, which is skipped."""
        if type_code == _STRING:
            return self.string()
        if type_code == _ARRAY:
            self._skip_array(depth=1)
            return None
        form = self._form(type_code)
        start = self.offset
        self.skip(form.size)
        scalar: Scalar = form.unpack_from(self._view, start)[0]
        return scalar

    def _skip_array(self, depth: int) -> None:
        if depth > _MAX_ARRAY_DEPTH:
            raise ValueError("arrays are nested too deeply")
        type_code, size = self.number(_U32), self.number(_U64)
        if type_code not in (_STRING, _ARRAY):
            self.skip(size * self._form(type_code).size)
            return
        for _ in range(size):
            if type_code == _STRING:
                self.skip(self.number(_U64))
            else:
                self._skip_array(depth + 1)

    def _form(self, type_code: int) -> struct.Struct:
        if type_code not in _SCALARS:
            raise ValueError(f"metadata of unknown type {type_code}")
        return _SCALARS[type_code]

"""Native CPU kernels: C++ behind a plain C interface, programs of ops over paged, quantized rows.

`load()` is None where the library was not built; callers then use torch operators. See README.md.
"""

from heedful_kernels.cpu.buffers import (
    Activation,
    Batch,
    KVCache,
    LoraSlots,
    QuantizedRows,
    RopeTable,
)
from heedful_kernels.cpu.library_path import find_library
from heedful_kernels.cpu.native import NativeKernelError, NativeLibrary, ThreadPool, load
from heedful_kernels.cpu.packing import (
    Arena,
    PackedWeight,
    pack_q4_1,
    pack_q8_0,
    packed_bytes,
    quantize_q4,
    quantize_q8,
    unpack,
)
from heedful_kernels.cpu.program import Program, ProgramBuilder

__all__ = [
    "Activation",
    "Arena",
    "Batch",
    "KVCache",
    "LoraSlots",
    "NativeKernelError",
    "NativeLibrary",
    "PackedWeight",
    "Program",
    "ProgramBuilder",
    "QuantizedRows",
    "RopeTable",
    "ThreadPool",
    "find_library",
    "load",
    "pack_q4_1",
    "pack_q8_0",
    "packed_bytes",
    "quantize_q4",
    "quantize_q8",
    "unpack",
]

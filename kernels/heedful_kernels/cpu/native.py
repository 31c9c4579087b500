"""The shared library of native CPU kernels, bound with ctypes: loading it, and its thread pool.

Owns the C structs' mirror and every raw call. Knows nothing of models; `program.py` builds what
runs here. Calls release the GIL. Used by one engine thread per pool.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from heedful_kernels.cpu.library_path import ABI_VERSION, find_library

MAX_DIMS: Final = 10
MAX_INPUTS: Final = 8
MAX_OUTPUTS: Final = 4
ISA_VARIABLE: Final = "HEEDFUL_CPU_ISA"
ISAS: Final = ("generic", "avx2", "avx512vnni")


class NativeKernelError(RuntimeError):
    """The library refused a program or a batch; the message says which op and why."""


class Op(ctypes.Structure):
    """`hk_op`: one operation; which slot holds what is documented in `heedful_cpu.h`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("dims", ctypes.c_int32 * MAX_DIMS),
        ("params", ctypes.c_float * 4),
        ("inputs", ctypes.c_void_p * MAX_INPUTS),
        ("outputs", ctypes.c_void_p * MAX_OUTPUTS),
    )


class Limits(ctypes.Structure):
    """`hk_limits`: how many rows a program's buffers hold."""

    _fields_ = (("max_rows", ctypes.c_int32), ("max_selected", ctypes.c_int32))


class BatchPointers(ctypes.Structure):
    """`hk_batch`: one step's rows."""

    _fields_ = (
        ("num_rows", ctypes.c_int32),
        ("num_selected", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("selected_rows", ctypes.c_void_p),
        ("lora_slot", ctypes.c_void_p),
    )


class NativeLibrary:
    """The loaded library, fixed to one instruction set. Stateless; it may be shared by threads."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        self.path = path
        self._c = _bind(ctypes.CDLL(str(path)))
        requested = isa or os.environ.get(ISA_VARIABLE, "")
        name = self._c.hk_isa(requested.encode())
        if name is None:
            raise NativeKernelError(self._last_error())
        self.isa: str = name.decode()

    def supports(self, isa: str) -> bool:
        """Whether this machine and this build can run the instruction set of that name."""
        return self._c.hk_isa(isa.encode()) is not None

    def create_pool(self, num_threads: int, spin_us: int) -> int:
        """Raw `hk_pool_create`; callers want `ThreadPool`."""
        return self._handle(self._c.hk_pool_create(num_threads, self.isa.encode(), spin_us))

    def destroy_pool(self, pool: int) -> None:
        """Raw `hk_pool_destroy`."""
        self._c.hk_pool_destroy(pool)

    def create_program(self, ops: list[Op], limits: Limits) -> int:
        """Raw `hk_program_create`; callers want `ProgramBuilder.build`."""
        return self._handle(self._c.hk_program_create((Op * len(ops))(*ops), len(ops), limits))

    def destroy_program(self, program: int) -> None:
        """Raw `hk_program_destroy`."""
        self._c.hk_program_destroy(program)

    def run(
        self,
        pool: int,
        program: int,
        batch: BatchPointers,
        op_seconds: ctypes.Array[ctypes.c_double] | None,
    ) -> None:
        """Raw `hk_run`; NativeKernelError when the batch does not fit the program."""
        if self._c.hk_run(pool, program, ctypes.byref(batch), op_seconds):
            raise NativeKernelError(self._last_error())

    def _handle(self, handle: int | None) -> int:
        if handle is None:
            raise NativeKernelError(self._last_error())
        return handle

    def _last_error(self) -> str:
        message: bytes = self._c.hk_last_error()
        return message.decode()


class ThreadPool:
    """Threads that run programs. The calling thread is one of them, so 1 starts none.

    Workers spin for `spin_us` after a run and then sleep; close it, or use it as a context manager.
    """

    def __init__(self, library: NativeLibrary, num_threads: int, *, spin_us: int = 50) -> None:
        self.library = library
        self.num_threads = num_threads
        self._handle = library.create_pool(num_threads, spin_us)
        self._joined = weakref.finalize(self, library.destroy_pool, self._handle)

    @property
    def handle(self) -> int:
        """The C pool; NativeKernelError once closed."""
        if not self._joined.alive:
            raise NativeKernelError("the thread pool is closed")
        return self._handle

    def close(self) -> None:
        """Joins the threads; no run may be in progress."""
        self._joined()

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(isa: str | None = None) -> NativeLibrary | None:
    """The native kernels, or None when no library has been built for these sources.

    Args:
        isa: generic, avx2 or avx512vnni; None takes $HEEDFUL_CPU_ISA, else the best one here.

    Raises:
        NativeKernelError: the instruction set is unknown or this machine lacks it.
    """
    path = find_library()
    return None if path is None else NativeLibrary(path, isa)


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "hk_abi_version": (integer, []),
        "hk_isa": (text, [text]),
        "hk_last_error": (text, []),
        "hk_pool_create": (pointer, [integer, text, integer]),
        "hk_pool_destroy": (None, [pointer]),
        "hk_program_create": (pointer, [ctypes.POINTER(Op), integer, Limits]),
        "hk_program_destroy": (None, [pointer]),
        "hk_run": (integer, [pointer, pointer, ctypes.POINTER(BatchPointers), pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = library[name]
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    if library.hk_abi_version() != ABI_VERSION:
        raise NativeKernelError(f"library ABI {library.hk_abi_version()}, wanted {ABI_VERSION}")
    return library

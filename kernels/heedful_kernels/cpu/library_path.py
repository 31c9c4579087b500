"""Where the native library lies, and the name that ties it to its sources.

Owns the list of sources and flags, and a file name that hashes them all, so that a stale library is
never found. Imports nothing but the standard library. Used by the build and by whoever loads.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path
from typing import Final

ABI_VERSION: Final = 1
SOURCES: Final = Path(__file__).parent / "src"
LIBRARIES: Final = Path(__file__).parent / "_lib"
COMMON_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    # One row must get the same bits in every blocking, so only written FMAs may be fused.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
X86_FLAGS: Final = {
    "isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "isa_avx512vnni.cpp": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw"),
        *("-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
}
_X86_MACHINES: Final = ("x86_64", "AMD64")


def find_library() -> Path | None:
    """The library built from exactly these sources for this machine, or None."""
    path = library_path()
    return path if path.is_file() else None


def translation_units() -> list[Path]:
    """The C++ files that this kind of machine compiles."""
    on_x86 = platform.machine() in _X86_MACHINES
    return [path for path in sorted(SOURCES.glob("*.cpp")) if on_x86 or path.name not in X86_FLAGS]


def library_path() -> Path:
    """The name that a library built from these sources has, whether or not it exists."""
    digest = hashlib.sha256(repr((ABI_VERSION, COMMON_FLAGS, X86_FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    name = f"heedful_cpu-{sys.platform}-{platform.machine()}-{digest.hexdigest()[:16]}.so"
    return LIBRARIES / name

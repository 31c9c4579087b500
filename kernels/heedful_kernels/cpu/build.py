"""Compiles the native CPU kernels: `python -m heedful_kernels.cpu.build`.

Owns finding a compiler and running it. Knows nothing of what the sources do. Run at install time or
from a Makefile, never while serving.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from heedful_kernels.cpu.library_path import (
    COMMON_FLAGS,
    LIBRARIES,
    X86_FLAGS,
    find_library,
    library_path,
    translation_units,
)


def find_compiler() -> str | None:
    """$CXX, else the first C++ compiler on the path."""
    candidates = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def build(compiler: str) -> Path:
    """Compiles, links and returns the path; RuntimeError holds the compiler's words."""
    target = library_path()
    LIBRARIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARIES) as scratch:
        commands = []
        for source in translation_units():
            flags = (*COMMON_FLAGS, *X86_FLAGS.get(source.name, ()))
            output = Path(scratch) / f"{source.stem}.o"
            commands.append([compiler, *flags, "-c", str(source), "-o", str(output)])
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as threads:
            list(threads.map(_run, commands))
        linked = Path(scratch) / target.name
        objects = [command[-1] for command in commands]
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(linked)])
        # Renaming last: another process sees the old library, none, or all of the new one.
        os.replace(linked, target)
    for stale in LIBRARIES.glob("*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


def main() -> int:
    """Builds unless the library is there already; 0 also without a compiler."""
    found = find_library()
    if found is not None:
        print(f"native CPU kernels: {found.name} is up to date")
        return 0
    compiler = find_compiler()
    if compiler is None:
        print("native CPU kernels: no compiler: torch operators will be used")
        return 0
    started = time.monotonic()
    try:
        path = build(compiler)
    except RuntimeError as error:
        print(f"native CPU kernels: {error}\ntorch operators will be used", file=sys.stderr)
        return 1
    print(f"native CPU kernels: built {path.name} in {time.monotonic() - started:.0f} s")
    return 0


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures for the kernels' tests: where Triton kernels run, the native library per instruction
set, and one-op programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from heedful_kernels import launch
from heedful_kernels.cpu import (
    Batch,
    NativeKernelError,
    NativeLibrary,
    ProgramBuilder,
    ThreadPool,
    load,
)
from heedful_kernels.cpu.build import build, find_compiler
from heedful_kernels.cpu.native import ISAS

NATIVE = torch.cuda.is_available() and not launch.INTERPRETED


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") is None:
        return
    # Lanes that a mask leaves out compute with whatever is there, and numpy says so.
    item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
    if NATIVE:
        item.add_marker("gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Triton decides when a kernel is defined whether it is interpreted: test_interpreter.py runs
    # these in a process of their own, so that nothing else is computed by the interpreter.
    if NATIVE or launch.INTERPRETED:
        return
    away = [item for item in items if item.get_closest_marker("triton")]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not item.get_closest_marker("triton")]


if launch.INTERPRETED:
    from triton.runtime import interpreter

    _patched: set[int] = set()

    def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        # The interpreter replaces Triton's operators anew at every call of a device function, sums
        # and maxima included, which takes most of its time; once per module is as good.
        if id(function.fn.__globals__) not in _patched:
            interpreter._patch_lang(function.fn)
            _patched.add(id(function.fn.__globals__))
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_device_function


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this process: a GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if NATIVE else "cpu")


@pytest.fixture(scope="session")
def roundoff() -> Callable[[torch.dtype], float]:
    """The largest relative error of rounding fp32 to a dtype; the interpreter truncates to bf16."""

    def of(dtype: torch.dtype) -> float:
        truncates = launch.INTERPRETED and dtype == torch.bfloat16
        return torch.finfo(dtype).eps / (1 if truncates else 2)

    return of


class CpuHarness:
    """Runs programs of a few ops on one instruction set, on one thread or two."""

    def __init__(self, library: NativeLibrary) -> None:
        self.library = library
        self.pools = {threads: ThreadPool(library, threads) for threads in (1, 2)}

    def builder(self, rows: int, selected: int | None = None) -> ProgramBuilder:
        chosen = rows if selected is None else selected
        return ProgramBuilder(self.library, max_rows=max(rows, 1), max_selected=max(chosen, 1))

    def run(
        self,
        batch: Batch,
        add_ops: Callable[[ProgramBuilder], None],
        *,
        rows: int | None = None,
        threads: int = 2,
    ) -> None:
        """Builds a program for `rows` rows (default: the batch's) and runs it once."""
        builder = self.builder(
            batch.token_ids.shape[0] if rows is None else rows, batch.selected_rows.shape[0]
        )
        add_ops(builder)
        program = builder.build()
        program.run(self.pools[threads], batch)
        program.close()

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


@pytest.fixture(scope="session", params=ISAS)
def cpu(request: pytest.FixtureRequest) -> Iterator[CpuHarness]:
    """The native kernels with each instruction set that this machine has."""
    compiler = find_compiler()
    library = load("generic")
    if library is None:
        if compiler is None:
            pytest.skip("no C++ compiler, so no native CPU kernels")
        build(compiler)
    try:
        library = load(request.param)
    except NativeKernelError as error:
        pytest.skip(str(error))
    assert library is not None
    assert library.isa == request.param
    harness = CpuHarness(library)
    yield harness
    harness.close()


@pytest.fixture
def rows_batch() -> Callable[..., Batch]:
    """Makes a batch of rows for ops that look at no cache: every row is selected."""

    def make(rows: int, **fields: torch.Tensor) -> Batch:
        zeros = torch.zeros(rows, dtype=torch.int32)
        defaults = {
            "token_ids": zeros,
            "positions": zeros,
            "sequence": zeros,
            "block_tables": torch.zeros(min(rows, 1), 1, dtype=torch.int32),
            "slot_mapping": torch.full((rows,), -1, dtype=torch.int64),
            "selected_rows": torch.arange(rows, dtype=torch.int32),
        }
        return Batch(**(defaults | fields))

    return make


@pytest.fixture
def poison() -> Callable[..., torch.Tensor]:
    """Makes fp32 outputs full of NaN, so that an element nobody wrote is seen."""

    def make(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"))

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261123)

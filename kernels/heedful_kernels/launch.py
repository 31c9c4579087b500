"""What every Triton operation of this package shares: where it runs, refusals, counted fallbacks.

Owns the import of Triton (which CPU installations need not have), the decision whether a call runs
a Triton kernel, and the counters of calls that did not get one on a GPU. Knows no operation. The
counters are process-wide, as metrics are; any thread.

A call runs the Triton kernel when its tensors are on a CUDA device, or on a CPU in a process that
was started with TRITON_INTERPRET=1 (Triton reads that variable when a kernel is defined). On any
other device it runs the torch reference of the same file. A CUDA call that cannot have the kernel
runs the reference and is counted by operation and reason: it is never silently slow.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

try:
    import triton
    from triton import language

    HAS_TRITON = True
except ImportError:
    HAS_TRITON, triton, language = False, None, None

tl: Any = language

INTERPRETED: Final = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
# Stated, because Triton's default changes between its releases (and warns about that).
COMPILE: Final = {"enable_fp_fusion": True}
FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)

_fallbacks: Counter[str] = Counter()


class RefusedInputError(ValueError):
    """An operation was handed something that it does not compute; the message names it."""


def jit(function: Callable[..., Any]) -> Any:
    """A Triton kernel; without Triton the function itself, which then nobody calls."""
    return triton.jit(function) if HAS_TRITON else function


def runs_triton(operation: str, tensor: Tensor, unsupported: str = "") -> bool:
    """Whether a call on this tensor's device runs the Triton kernel.

    Args:
        operation: the operation's name, for the counter.
        tensor: one of the operands.
        unsupported: why the kernel cannot take this call, or "" where it can.
    """
    if not tensor.is_cuda:
        return INTERPRETED and tensor.device.type == "cpu" and not unsupported
    reason = unsupported or ("" if HAS_TRITON else "no_triton")
    if reason:
        _fallbacks[f"{operation}:{reason}"] += 1
    return not reason


def count_fallback(operation: str, reason: str) -> None:
    """Count a call that took a slower way than the one that it is meant to take."""
    _fallbacks[f"{operation}:{reason}"] += 1


def fallback_counts() -> dict[str, int]:
    """How often each "operation:reason" fell back since the process started."""
    return dict(_fallbacks)


def refuse_unless(condition: bool, operation: str, message: str) -> None:
    """Raise RefusedInputError(f"{operation}: {message}") unless the condition holds."""
    if not condition:
        raise RefusedInputError(f"{operation}: {message}")


def dot_dtype(dtype: torch.dtype) -> Any:
    """The type of the operands of a matrix product: their own, but fp32 in the interpreter.

    The interpreter holds bf16 as 16-bit integers and would multiply those.
    """
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least value; 1 for values below 2."""
    return 1 << max(value - 1, 0).bit_length()


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient of two non-negative numbers, rounded up."""
    return -(-numerator // denominator)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; of the reference device where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

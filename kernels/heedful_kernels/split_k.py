"""Cutting a product's inner dimension into parts, and joining the parts: shared by the products.

    y_mn = sum_p partial_pmn + bias_n

with partial fp32 [P, M, N]. Owns how many parts a product of given size gets, and the kernel that
joins them in a fixed order, so that results are the same bits every time. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful_kernels.launch import COMPILE, INTERPRETED, cdiv, jit, num_multiprocessors, tl


def num_parts(
    programs: int, rows: int, outputs: int, weight_bytes: int, device: torch.device
) -> int:
    """How many parts let the programs fill the device without the partial sums costing much.

    Partial sums are written and read once, 8 bytes each; they may cost an eighth of the weights.
    """
    wanted = cdiv(4 * num_multiprocessors(device), max(programs, 1))
    affordable = weight_bytes // (8 * 8 * max(rows * outputs, 1))
    return max(1, min(wanted, affordable, 16))


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    partial,
    bias,
    out,
    num_elements,
    N,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < num_elements
    y = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        y += tl.load(partial + part * num_elements.to(tl.int64) + i, mask=ok, other=0.0)
    if BIAS:
        y += tl.load(bias + i % N, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + i, y, mask=ok)


def join_parts(partial_PMN: Tensor, bias_N: Tensor | None, out_MN: Tensor) -> None:
    """Write the sum over parts, plus bias, into out."""
    elements = out_MN.numel()
    block = 64 if INTERPRETED else 1024
    _join_kernel[(cdiv(elements, block),)](
        partial_PMN, bias_N if bias_N is not None else partial_PMN, out_MN,
        elements, out_MN.shape[1],
        PARTS=partial_PMN.shape[0], BIAS=bias_N is not None, BLOCK=block, **COMPILE,
    )  # fmt: skip

"""Product of activations with an int8 weight in bitsandbytes' layout, weight-only.

    y_mn = scale_n / 127 sum_k x_mk data_nk + bias_n

with x [M, K], data int8 [N, K], scale fp32 [N], y [M, N] in the dtype of x. Activations are not
quantized (bitsandbytes' own product does that, and loses outliers' precision). Integers up to 127
are exact in bf16 and fp16, so the product is that of the dequantized weight without its rounding.
The weight is the first operand and the tokens are the columns of the second, as in nf4_matmul.py;
a table by M takes the library's product of the dequantized weight above 64 rows. fixed_tiles makes
a row's result independent of how many come with it. Pure functions, any thread. Inference only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_kernels.bnb_layout import Int8Weight, dequantize_int8_reference
from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    INTERPRETED,
    cdiv,
    dot_dtype,
    jit,
    refuse_unless,
    runs_triton,
    tl,
)
from heedful_kernels.split_k import join_parts, num_parts

_NAME: Final = "int8_matmul"
# Above this many rows the weight is dequantized for the library's product.
MAX_FUSED_ROWS: Final = 64


def int8_matmul(
    x_MK: Tensor, weight: Int8Weight, bias_N: Tensor | None = None, *, fixed_tiles: bool = False
) -> Tensor:
    """x W^T + bias, [M, N] in the dtype of x.

    Args:
        x_MK: bf16, fp16 or fp32; any strides.
        weight: on x's device; its data contiguous.
        bias_N: any float dtype.
        fixed_tiles: one tile for every M, for results that do not depend on the batch.

    Raises:
        RefusedInputError: shapes, dtypes or devices do not go together.
    """
    data_NK, scale_N = weight.data, weight.scale
    refuse_unless(
        data_NK.dim() == 2 and data_NK.dtype == torch.int8 and data_NK.is_contiguous(),
        _NAME,
        f"weight must be a contiguous int8 [N, K], not {data_NK.dtype} {tuple(data_NK.shape)}",
    )
    rows, columns = data_NK.shape
    refuse_unless(
        scale_N.shape == (rows,) and scale_N.dtype == torch.float32,
        _NAME,
        f"scale must be fp32 [{rows}], not {scale_N.dtype} {tuple(scale_N.shape)}",
    )
    refuse_unless(
        x_MK.dim() == 2 and x_MK.shape[1] == columns and x_MK.dtype in FLOATS,
        _NAME,
        f"x must be a bf16, fp16 or fp32 [M, {columns}], not {x_MK.dtype} {tuple(x_MK.shape)}",
    )
    refuse_unless(bias_N is None or bias_N.shape == (rows,), _NAME, f"bias must be [{rows}]")
    refuse_unless(x_MK.device == data_NK.device, _NAME, "tensors on two devices")
    out: Tensor = _op(x_MK, data_NK, scale_N, bias_N, fixed_tiles)
    return out


def int8_matmul_reference(x_MK: Tensor, weight: Int8Weight, bias_N: Tensor | None) -> Tensor:
    """Dequantize, then torch's own product, in the dtype of x."""
    w_NK = dequantize_int8_reference(weight, x_MK.dtype)
    return F.linear(x_MK, w_NK, None if bias_N is None else bias_N.to(x_MK.dtype))


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, data, scale, bias, out,
    M, N, x_stride, k_per_part,
    K: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_ok, m_ok = n < N, m < M
    n_wide, m_wide = n.to(tl.int64), m.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = part * k_per_part
    last = tl.minimum(first + k_per_part, K)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < last
        w = tl.load(data + n_wide[:, None] * K + k[None, :],
                    mask=n_ok[:, None] & k_ok[None, :], other=0).to(DOT)  # fmt: skip
        columns = tl.load(x + m_wide[None, :] * x_stride + k[:, None],
                          mask=m_ok[None, :] & k_ok[:, None], other=0.0).to(DOT)  # fmt: skip
        acc = tl.dot(w, columns, acc, input_precision="ieee")
    acc *= (tl.load(scale + n, mask=n_ok, other=0.0) / 127.0)[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    place = out + m_wide[None, :] * N + n[:, None]
    if SPLIT:
        place += part.to(tl.int64) * M * N
    tl.store(place, acc, mask=n_ok[:, None] & m_ok[None, :])


def _tiles(rows: int, *, fixed_tiles: bool) -> dict[str, Any]:
    """The table by M."""
    if INTERPRETED:
        return {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_K": 32}
    if fixed_tiles or rows <= 16:
        block_m, stages = 16, 5
    else:
        block_m, stages = (32, 4) if rows <= 32 else (64, 4)
    return {
        "BLOCK_N": 64,
        "BLOCK_M": block_m,
        "BLOCK_K": 128,
        "num_warps": 4,
        "num_stages": stages,
    }


@torch.library.custom_op("heedful::int8_matmul", mutates_args=())
def _op(
    x_MK: Tensor, data_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, fixed_tiles: bool
) -> Tensor:
    if not runs_triton(_NAME, x_MK):
        return int8_matmul_reference(x_MK, Int8Weight(data_NK, scale_N), bias_N)
    (outputs, columns), rows = data_NK.shape, len(x_MK)
    if rows > MAX_FUSED_ROWS and not fixed_tiles:
        # Exact integers, scaled after the product: nothing is rounded that the kernel keeps.
        y_MN = F.linear(x_MK, data_NK.to(x_MK.dtype)).float() * (scale_N / 127.0)
        return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype)
    out_MN = torch.empty(rows, outputs, dtype=x_MK.dtype, device=x_MK.device)
    if out_MN.numel() == 0 or columns == 0:
        return out_MN
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    tiles = _tiles(rows, fixed_tiles=fixed_tiles)
    grid = (cdiv(outputs, tiles["BLOCK_N"]), cdiv(rows, tiles["BLOCK_M"]))
    counted = 1 if fixed_tiles else rows
    programs = grid[0] if fixed_tiles else grid[0] * grid[1]
    parts = num_parts(programs, counted, outputs, data_NK.nbytes, x_MK.device)
    per_part = cdiv(cdiv(columns, parts), tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    parts = cdiv(columns, per_part)
    split = parts > 1
    target = x_MK.new_empty((parts, rows, outputs), dtype=torch.float32) if split else out_MN
    _kernel[(*grid, parts)](
        x_MK, data_NK, scale_N, scale_N if bias_N is None else bias_N, target,
        rows, outputs, x_MK.stride(0), per_part,
        K=columns, BIAS=bias_N is not None and not split, SPLIT=split,
        DOT=dot_dtype(x_MK.dtype), **tiles, **COMPILE,
    )  # fmt: skip
    if split:
        join_parts(target, bias_N, out_MN)
    return out_MN


@_op.register_fake
def _(
    x_MK: Tensor, data_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, fixed_tiles: bool
) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], data_NK.shape[0])

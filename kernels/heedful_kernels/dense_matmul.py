"""Product of activations with a float weight, a row's bits the same whatever rows come with it.

    y_mn = sum_k x_mk w_nk + bias_n

with x [M, K], the weight [N, K] and y [M, N], all of one dtype. The library's product picks another
kernel for another M, and with it another order of summing; here one tile serves every M, and K is
cut into parts that depend on N, K and the device alone and are added in order. Where bits may
depend on the batch the library's product is the faster one. The weight is the first operand and the
tokens are the columns of the second, as in nf4_matmul.py.

What it rests on: a compiled kernel computes an output in the same order whichever tile it is in.
The reference is the library's product and promises nothing. Pure functions, any thread. Inference
only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

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

_NAME: Final = "dense_matmul"


def dense_matmul(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias, [M, N] in the dtype of x.

    Args:
        x_MK: bf16, fp16 or fp32; any strides.
        weight_NK: contiguous, of x's dtype and device.
        bias_N: any float dtype.

    Raises:
        RefusedInputError: shapes, dtypes or devices do not go together.
    """
    refuse_unless(
        weight_NK.dim() == 2 and weight_NK.is_contiguous() and weight_NK.dtype in FLOATS,
        _NAME,
        f"weight must be a contiguous float [N, K], not {weight_NK.dtype} {tuple(weight_NK.shape)}",
    )
    rows, columns = weight_NK.shape
    refuse_unless(
        x_MK.dim() == 2 and x_MK.shape[1] == columns and x_MK.dtype == weight_NK.dtype,
        _NAME,
        f"x must be a {weight_NK.dtype} [M, {columns}], not {x_MK.dtype} {tuple(x_MK.shape)}",
    )
    refuse_unless(bias_N is None or bias_N.shape == (rows,), _NAME, f"bias must be [{rows}]")
    refuse_unless(x_MK.device == weight_NK.device, _NAME, "tensors on two devices")
    out: Tensor = _op(x_MK, weight_NK, bias_N)
    return out


def dense_matmul_reference(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Torch's own product."""
    return F.linear(x_MK, weight_NK, None if bias_N is None else bias_N.to(x_MK.dtype))


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out,
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
        w = tl.load(weight + n_wide[:, None] * K + k[None, :],
                    mask=n_ok[:, None] & k_ok[None, :], other=0.0).to(DOT)  # fmt: skip
        columns = tl.load(x + m_wide[None, :] * x_stride + k[:, None],
                          mask=m_ok[None, :] & k_ok[:, None], other=0.0).to(DOT)  # fmt: skip
        acc = tl.dot(w, columns, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    place = out + m_wide[None, :] * N + n[:, None]
    if SPLIT:
        place += part.to(tl.int64) * M * N
    tl.store(place, acc, mask=n_ok[:, None] & m_ok[None, :])


def _tile(dtype: torch.dtype) -> dict[str, Any]:
    """The one tile: small enough in M for decoding, large enough not to crawl through prompts."""
    if INTERPRETED:
        return {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_K": 32}
    # fp32 products run on no tensor core: a large tile would only spill.
    block_m = 16 if dtype == torch.float32 else 32
    return {"BLOCK_N": 64, "BLOCK_M": block_m, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


@torch.library.custom_op("heedful::dense_matmul", mutates_args=())
def _op(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not runs_triton(_NAME, x_MK):
        return dense_matmul_reference(x_MK, weight_NK, bias_N)
    (outputs, columns), rows = weight_NK.shape, len(x_MK)
    if rows == 0 or outputs == 0 or columns == 0:
        return dense_matmul_reference(x_MK, weight_NK, bias_N)
    out_MN = torch.empty(rows, outputs, dtype=x_MK.dtype, device=x_MK.device)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    tile = _tile(x_MK.dtype)
    # As for one row, whatever M is.
    programs = cdiv(outputs, tile["BLOCK_N"])
    parts = num_parts(programs, 1, outputs, weight_NK.nbytes, x_MK.device)
    per_part = cdiv(cdiv(columns, parts), tile["BLOCK_K"]) * tile["BLOCK_K"]
    parts = cdiv(columns, per_part)
    split = parts > 1
    target = x_MK.new_empty((parts, rows, outputs), dtype=torch.float32) if split else out_MN
    _kernel[(programs, cdiv(rows, tile["BLOCK_M"]), parts)](
        x_MK, weight_NK, weight_NK if bias_N is None else bias_N, target,
        rows, outputs, x_MK.stride(0), per_part,
        K=columns, BIAS=bias_N is not None and not split, SPLIT=split,
        DOT=dot_dtype(x_MK.dtype), **tile, **COMPILE,
    )  # fmt: skip
    if split:
        join_parts(target, bias_N, out_MN)
    return out_MN


@_op.register_fake
def _(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])

"""Product of activations with an NF4 weight, straight from bitsandbytes' packed bytes.

    y_mn = sum_k x_mk code[nibble_nk] absmax[(n K + k) // blocksize] + bias_n

with x [M, K], the weight [N, K] as in bnb_layout.py (nested absmax is decoded on the way), y [M, N]
in the dtype of x. The weight is never written out: the kernel holds a tile of codes, W, as the
first operand and the tokens as the columns of the second, y^T = W x^T, because few tokens are
served by a product whose wide side is the weight. A byte holds an even and an odd k: two products,
one over each, need no interleaving, and x is read as 32-bit words that hold both. Codes enter the
product in the dtype of x and the block's absmax multiplies its fp32 sum, so that a weight costs a
shift, a mask and a table look-up, and no multiplication.

A table by M, reasoned from byte counts and not yet measured, takes the kernel up to 64 rows and
dequantizes for the library's product above. With fixed_tiles one shape of tile serves every M, so
that a row's result does not depend on how many come with it.

Weights whose rows are no multiple of the block's chunk are dequantized too, and counted. Pure
functions, any thread. Inference only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_kernels.bnb_layout import Nf4Weight, check_nf4, dequantize_nf4_reference
from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    INTERPRETED,
    cdiv,
    count_fallback,
    dot_dtype,
    jit,
    refuse_unless,
    runs_triton,
    tl,
)
from heedful_kernels.split_k import join_parts, num_parts

_NAME: Final = "nf4_matmul"
# Above this many rows the weight is dequantized for the library's product.
MAX_FUSED_ROWS: Final = 64


def nf4_matmul(
    x_MK: Tensor, weight: Nf4Weight, bias_N: Tensor | None = None, *, fixed_tiles: bool = False
) -> Tensor:
    """x W^T + bias, [M, N] in the dtype of x.

    Args:
        x_MK: bf16, fp16 or fp32; any strides.
        weight: on x's device.
        bias_N: any float dtype.
        fixed_tiles: one tile for every M, for results that do not depend on the batch.

    Raises:
        RefusedInputError: shapes, dtypes or devices do not go together.
    """
    rows, columns = check_nf4(weight).shape
    refuse_unless(
        x_MK.dim() == 2 and x_MK.shape[1] == columns and x_MK.dtype in FLOATS,
        _NAME,
        f"x must be a bf16, fp16 or fp32 [M, {columns}], not {x_MK.dtype} {tuple(x_MK.shape)}",
    )
    refuse_unless(bias_N is None or bias_N.shape == (rows,), _NAME, f"bias must be [{rows}]")
    refuse_unless(x_MK.device == weight.packed.device, _NAME, "tensors on two devices")
    out: Tensor = _op(x_MK, *_tensors(weight), bias_N, list(_numbers(weight)), fixed_tiles)
    return out


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], each value rounded once to dtype."""
    check_nf4(weight)
    refuse_unless(dtype in FLOATS, _NAME, f"dtype {dtype}")
    out: Tensor = _dequantize_op(*_tensors(weight), list(_numbers(weight)), dtype)
    return out


def nf4_matmul_reference(x_MK: Tensor, weight: Nf4Weight, bias_N: Tensor | None) -> Tensor:
    """Dequantize, then torch's own product, in the dtype of x."""
    w_NK = dequantize_nf4_reference(weight, x_MK.dtype)
    return F.linear(x_MK, w_NK, None if bias_N is None else bias_N.to(x_MK.dtype))


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _tensors(weight: Nf4Weight) -> _Tensors:
    return (
        weight.packed,
        weight.absmax,
        weight.code,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
    )


def _numbers(weight: Nf4Weight) -> tuple[int, int, int, int]:
    return *weight.shape, weight.blocksize, weight.nested_blocksize


def _weight(tensors: _Tensors, numbers: list[int]) -> Nf4Weight:
    packed, absmax, code, nested_absmax, nested_code, nested_offset = tensors
    rows, columns, blocksize, nested_blocksize = numbers
    return Nf4Weight(
        packed,
        absmax,
        code,
        (rows, columns),
        blocksize,
        nested_absmax,
        nested_code,
        nested_offset,
        nested_blocksize,
    )


@jit
def _block_absmax(  # type: ignore[no-untyped-def]
    absmax, nested_absmax, nested_code, offset, block, ok,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    if NESTED:
        index = tl.load(absmax + block, mask=ok, other=0).to(tl.int32)
        value = tl.load(nested_code + index)
        factor = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=ok, other=0.0)
        scale = value * factor + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=ok, other=0.0)
    return scale


@jit
def _matmul_kernel(  # type: ignore[no-untyped-def]
    x, packed, absmax, code, nested_absmax, nested_code, offset, bias, out,
    M, N, x_stride, chunks_per_part,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr,
    X: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = CHUNK // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_ok, m_ok = n < N, m < M
    half = tl.arange(0, HALF)
    n_wide, m_wide = n.to(tl.int64), m.to(tl.int64)
    bytes_nk = packed + n_wide[:, None] * (K // 2) + half[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = part * chunks_per_part
    last = tl.minimum(first + chunks_per_part, K // CHUNK)
    for chunk in range(first, last):
        byte = tl.load(bytes_nk + chunk * HALF, mask=n_ok[:, None], other=0)
        high = tl.load(code + (byte >> 4).to(tl.int32)).to(DOT)
        low = tl.load(code + (byte & 15).to(tl.int32)).to(DOT)
        if WORDS:
            # 32-bit words of two neighbours: the even k in the low half.
            word = tl.load(x + m_wide[None, :] * x_stride + chunk * HALF + half[:, None],
                           mask=m_ok[None, :], other=0)  # fmt: skip
            even = (word & 0xFFFF).to(tl.uint16).to(X, bitcast=True)
            odd = ((word >> 16) & 0xFFFF).to(tl.uint16).to(X, bitcast=True)
        else:
            place = x + m_wide[None, :] * x_stride + chunk * CHUNK + 2 * half[:, None]
            even = tl.load(place, mask=m_ok[None, :], other=0.0)
            odd = tl.load(place + 1, mask=m_ok[None, :], other=0.0)
        y = tl.dot(high, even.to(DOT), input_precision="ieee")
        y = tl.dot(low, odd.to(DOT), y, input_precision="ieee")
        block = (n_wide * K + chunk * CHUNK) // BLOCKSIZE
        acc += y * _block_absmax(absmax, nested_absmax, nested_code, offset, block, n_ok,
                                 NESTED, NESTED_BLOCKSIZE)[:, None]  # fmt: skip
    mask = n_ok[:, None] & m_ok[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    place = out + m_wide[None, :] * N + n[:, None]
    if SPLIT:
        place += part.to(tl.int64) * M * N
    tl.store(place, acc, mask=mask)


@jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, absmax, code, nested_absmax, nested_code, offset, out, num_values,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = 2 * pair < num_values
    byte = tl.load(packed + pair, mask=ok, other=0)
    # Blocks hold an even number of values: both of a byte are in one.
    scale = _block_absmax(absmax, nested_absmax, nested_code, offset, 2 * pair // BLOCKSIZE, ok,
                          NESTED, NESTED_BLOCKSIZE)  # fmt: skip
    high = tl.load(code + (byte >> 4).to(tl.int32)) * scale
    low = tl.load(code + (byte & 15).to(tl.int32)) * scale
    tl.store(out + 2 * pair, high, mask=ok)
    tl.store(out + 2 * pair + 1, low, mask=2 * pair + 1 < num_values)


def _tiles(rows: int, *, fixed_tiles: bool) -> dict[str, Any]:
    """The table by M."""
    if INTERPRETED:
        return {"BLOCK_N": 16, "BLOCK_M": 16}
    if fixed_tiles or rows <= 16:
        return {"BLOCK_N": 64, "BLOCK_M": 16, "num_warps": 4, "num_stages": 5}
    block_m = 32 if rows <= 32 else 64
    return {"BLOCK_N": 64, "BLOCK_M": block_m, "num_warps": 4, "num_stages": 4}


@torch.library.custom_op("heedful::nf4_matmul", mutates_args=())
def _op(
    x_MK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_N: Tensor | None,
    numbers: list[int],
    fixed_tiles: bool,
) -> Tensor:
    tensors = (packed, absmax, code, nested_absmax, nested_code, nested_offset)
    weight = _weight(tensors, numbers)
    if not runs_triton(_NAME, x_MK):
        return nf4_matmul_reference(x_MK, weight, bias_N)
    columns, chunk = weight.shape[1], min(64, weight.blocksize)
    if columns % chunk:
        count_fallback(_NAME, "columns")
    if columns % chunk or (len(x_MK) > MAX_FUSED_ROWS and not fixed_tiles):
        w_NK = _dequantized(weight, x_MK.dtype)
        return F.linear(x_MK, w_NK, None if bias_N is None else bias_N.to(x_MK.dtype))
    return _fused(x_MK, weight, bias_N, fixed_tiles=fixed_tiles)


def _fused(x_MK: Tensor, weight: Nf4Weight, bias_N: Tensor | None, *, fixed_tiles: bool) -> Tensor:
    (outputs, columns), rows = weight.shape, len(x_MK)
    out_MN = torch.empty(rows, outputs, dtype=x_MK.dtype, device=x_MK.device)
    if out_MN.numel() == 0:
        return out_MN
    # Words want pairs of values at even addresses; a copy of the activations costs little.
    x_MK = x_MK.contiguous()
    words = x_MK.element_size() == 2
    operand = x_MK.view(torch.int32) if words and x_MK.data_ptr() % 4 == 0 else x_MK
    words = operand is not x_MK
    tiles = _tiles(rows, fixed_tiles=fixed_tiles)
    grid = (cdiv(outputs, tiles["BLOCK_N"]), cdiv(rows, tiles["BLOCK_M"]))
    chunk = min(64, weight.blocksize)
    chunks = columns // chunk
    # Fixed tiles also fix the parts, as for one row.
    counted = 1 if fixed_tiles else rows
    programs = grid[0] if fixed_tiles else grid[0] * grid[1]
    parts = min(num_parts(programs, counted, outputs, weight.packed.nbytes, x_MK.device), chunks)
    per_part = cdiv(chunks, parts)
    parts = cdiv(chunks, per_part)
    split = parts > 1
    target = x_MK.new_empty((parts, rows, outputs), dtype=torch.float32) if split else out_MN
    packed, absmax, code, nested_absmax, nested_code, nested_offset = _tensors(weight)
    nothing = absmax
    _matmul_kernel[(*grid, parts)](
        operand, packed.reshape(-1), absmax.reshape(-1), code,
        nothing if nested_absmax is None else nested_absmax,
        nothing if nested_code is None else nested_code,
        nothing if nested_offset is None else nested_offset,
        nothing if bias_N is None else bias_N, target,
        rows, outputs, operand.stride(0), per_part,
        K=columns, CHUNK=chunk, BLOCKSIZE=weight.blocksize,
        NESTED=nested_absmax is not None, NESTED_BLOCKSIZE=weight.nested_blocksize,
        BIAS=bias_N is not None and not split, SPLIT=split, WORDS=words,
        X=tl.bfloat16 if x_MK.dtype == torch.bfloat16 else tl.float16,
        DOT=dot_dtype(x_MK.dtype), **tiles, **COMPILE,
    )  # fmt: skip
    if split:
        join_parts(target, bias_N, out_MN)
    return out_MN


@_op.register_fake
def _(
    x_MK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_N: Tensor | None,
    numbers: list[int],
    fixed_tiles: bool,
) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], numbers[0])


@torch.library.custom_op("heedful::dequantize_nf4", mutates_args=())
def _dequantize_op(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    numbers: list[int],
    dtype: torch.dtype,
) -> Tensor:
    tensors = (packed, absmax, code, nested_absmax, nested_code, nested_offset)
    weight = _weight(tensors, numbers)
    if not runs_triton("dequantize_nf4", packed):
        return dequantize_nf4_reference(weight, dtype)
    return _dequantized(weight, dtype)


def _dequantized(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    packed, absmax, code, nested_absmax, nested_code, nested_offset = _tensors(weight)
    out_NK = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    if out_NK.numel() == 0:
        return out_NK
    block = 64 if INTERPRETED else 1024
    _dequantize_kernel[(cdiv(packed.numel(), block),)](
        packed.reshape(-1), absmax.reshape(-1), code,
        absmax if nested_absmax is None else nested_absmax,
        absmax if nested_code is None else nested_code,
        absmax if nested_offset is None else nested_offset, out_NK, out_NK.numel(),
        BLOCKSIZE=weight.blocksize, NESTED=nested_absmax is not None,
        NESTED_BLOCKSIZE=weight.nested_blocksize, BLOCK=block, **COMPILE,
    )  # fmt: skip
    return out_NK


@_dequantize_op.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    numbers: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(numbers[0], numbers[1], dtype=dtype, device=packed.device)

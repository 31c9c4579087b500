"""Low-rank adapters on a linear layer's output, many adapters in one batch.

    h_tr = sum_k x_tk a_srk              (shrink; s the slot of row t)
    y_tn += scale_s sum_r h_t,seg(n),r b_snr     (expand)

with x [T, K], y [T, N], slots int32 [T] (-1: no adapter), and for all slots together a
[slots, segments R, K], b [slots, N, R], scale fp32 [slots]. A segment is one of several layers that
are computed side by side (q, k and v; gate and up): segment g's rows of a are g R to (g + 1) R - 1,
its columns of y are bounds[g] to bounds[g + 1] - 1. Adapters of a lower rank have zeros in the rest
of a. One pair of launches serves all rows, slots and segments.

Rows are visited by slot in the order of a plan, made once per step on the device without a
synchronisation. Sums are fp32 with K cut into a fixed number of parts that are added in order, so a
row's result does not depend on the others as long as the tile does not change: at 256 rows, or
never with fixed_tiles.
Pure functions but for y, any thread. Inference only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    INTERPRETED,
    cdiv,
    dot_dtype,
    jit,
    next_power_of_2,
    refuse_unless,
    runs_triton,
    tl,
)

_NAME: Final = "lora"
_MAX_RANK: Final = 256
# q, k and v are three.
_MAX_SEGMENTS: Final = 4
_PART_COLUMNS: Final = 512


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Rows in order of their slots: order_T int32 [T] (rows without an adapter first), and where
    each slot's rows begin in it, starts int32 [slots + 1]. slots_T is the rows' slots.
    """

    order_T: Tensor
    starts_S1: Tensor
    slots_T: Tensor


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """All slots of one (stacked) layer; every tensor contiguous, zeros where nothing is loaded.

    Attributes:
        a: [slots, segments R, K].
        b: [slots, N, R], of a's dtype.
        scale: fp32 [slots].
        bounds: first column of each segment, and N.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    bounds: tuple[int, ...]


def plan_lora(slots_T: Tensor, num_slots: int) -> LoraPlan:
    """Order the rows by slot; slots_T int32 [T], each from -1 to num_slots - 1."""
    refuse_unless(
        slots_T.dim() == 1 and slots_T.dtype == torch.int32,
        _NAME,
        f"slots must be int32 [T], not {slots_T.dtype} {tuple(slots_T.shape)}",
    )
    order_T = torch.argsort(slots_T, stable=True).to(torch.int32)
    numbers_S1 = torch.arange(num_slots + 1, device=slots_T.device, dtype=torch.int32)
    starts_S1 = (slots_T[None] < numbers_S1[:, None]).sum(dim=1).to(torch.int32)
    return LoraPlan(order_T, starts_S1, slots_T)


def add_lora_(
    y_TN: Tensor, x_TK: Tensor, weights: LoraWeights, plan: LoraPlan, *, fixed_tiles: bool = False
) -> None:
    """Add every row's adapter to y in place; rows without one keep their bits.

    Args:
        y_TN: the base layer's output, unit stride along rows.
        x_TK: its input, of y's dtype (bf16, fp16 or fp32), unit stride along rows.
        weights: on the same device.
        plan: of these rows.
        fixed_tiles: one tile for every T, for results that do not depend on the batch.

    Raises:
        RefusedInputError: shapes, dtypes or strides do not go together.
    """
    _check(y_TN, x_TK, weights, plan)
    _op(
        y_TN,
        x_TK,
        weights.a,
        weights.b,
        weights.scale,
        plan.order_T,
        plan.starts_S1,
        plan.slots_T,
        list(weights.bounds),
        fixed_tiles,
    )


def add_lora_reference_(y_TN: Tensor, x_TK: Tensor, weights: LoraWeights, slots_T: Tensor) -> None:
    """The formulas in torch operators, a slot and a segment at a time, in fp32 or wider."""
    rank = weights.b.shape[2]
    wide = torch.promote_types(y_TN.dtype, torch.float32)
    for slot in range(len(weights.scale)):
        rows = (slots_T == slot).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        delta = torch.zeros(len(rows), y_TN.shape[1], dtype=wide, device=y_TN.device)
        for segment in range(len(weights.bounds) - 1):
            first, end = weights.bounds[segment : segment + 2]
            a = weights.a[slot, segment * rank : (segment + 1) * rank].to(wide)
            h = x_TK[rows].to(wide) @ a.T
            delta[:, first:end] = h @ weights.b[slot, first:end].to(wide).T * weights.scale[slot]
        y_TN[rows] = (y_TN[rows].to(wide) + delta).to(y_TN.dtype)


def _check(y_TN: Tensor, x_TK: Tensor, weights: LoraWeights, plan: LoraPlan) -> None:
    slots, outputs, rank = weights.b.shape
    segments = len(weights.bounds) - 1
    refuse_unless(
        weights.a.shape == (slots, segments * rank, x_TK.shape[-1])
        and weights.scale.shape == (slots,),
        _NAME,
        f"a {tuple(weights.a.shape)}, b {tuple(weights.b.shape)} and scale "
        f"{tuple(weights.scale.shape)} do not go with x {tuple(x_TK.shape)}",
    )
    refuse_unless(
        all(tensor.is_contiguous() for tensor in (weights.a, weights.b, weights.scale)),
        _NAME,
        "weights must be contiguous",
    )
    refuse_unless(1 <= segments <= _MAX_SEGMENTS, _NAME, f"{segments} segments")
    refuse_unless(
        weights.bounds[0] == 0
        and weights.bounds[-1] == outputs
        and list(weights.bounds) == sorted(weights.bounds),
        _NAME,
        f"bounds {weights.bounds} must run from 0 to {outputs}",
    )
    refuse_unless(
        x_TK.dim() == 2 and y_TN.shape == (len(x_TK), outputs),
        _NAME,
        f"x {tuple(x_TK.shape)}, y {tuple(y_TN.shape)}: must be [T, K] and [T, {outputs}]",
    )
    refuse_unless(
        x_TK.dtype == y_TN.dtype and weights.a.dtype == weights.b.dtype,
        _NAME,
        f"x {x_TK.dtype}, y {y_TN.dtype}, a {weights.a.dtype}, b {weights.b.dtype}",
    )
    refuse_unless(
        x_TK.stride(1) == 1 and y_TN.stride(1) == 1, _NAME, "rows of x and y must be contiguous"
    )
    refuse_unless(
        plan.order_T.shape == x_TK.shape[:1] and plan.starts_S1.shape == (slots + 1,),
        _NAME,
        f"the plan is for {len(plan.order_T)} rows and {len(plan.starts_S1) - 1} slots",
    )


@jit
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x, a, order, starts, h, num_rows, x_stride, k_per_part,
    K: tl.constexpr, RANKS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(2).to(tl.int64)
    first, end = tl.load(starts + slot), tl.load(starts + slot + 1)
    RANK_BLOCKS: tl.constexpr = (RANKS + BLOCK_R - 1) // BLOCK_R
    m0 = first + tl.program_id(0) * BLOCK_M
    if m0 < end:
        part, rank_block = tl.program_id(1) // RANK_BLOCKS, tl.program_id(1) % RANK_BLOCKS
        m = m0 + tl.arange(0, BLOCK_M)
        m_ok = m < end
        t = tl.load(order + m, mask=m_ok, other=0).to(tl.int64)
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_ok = r < RANKS
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        last = tl.minimum((part + 1) * k_per_part, K)
        for k0 in range(part * k_per_part, last, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            k_ok = k < last
            rows = tl.load(x + t[:, None] * x_stride + k[None, :],
                           mask=m_ok[:, None] & k_ok[None, :], other=0.0).to(DOT)  # fmt: skip
            w = tl.load(a + (slot * RANKS + r[None, :]) * K + k[:, None],
                        mask=r_ok[None, :] & k_ok[:, None], other=0.0).to(DOT)  # fmt: skip
            acc = tl.dot(rows, w, acc, input_precision="ieee")
        place = h + (part.to(tl.int64) * num_rows + t[:, None]) * RANKS + r[None, :]
        tl.store(place, acc, mask=m_ok[:, None] & r_ok[None, :])


@jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    h, b, scale, order, starts, y, num_rows, y_stride, end0, end1, end2, end3,
    N: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(2).to(tl.int64)
    first, end = tl.load(starts + slot), tl.load(starts + slot + 1)
    m0 = first + tl.program_id(0) * BLOCK_M
    if m0 < end:
        m = m0 + tl.arange(0, BLOCK_M)
        m_ok = m < end
        t = tl.load(order + m, mask=m_ok, other=0).to(tl.int64)
        # Which segment this block of columns is in, and where in it: a block never spans two.
        block = tl.program_id(1)
        blocks0 = tl.cdiv(end0, BLOCK_N)
        blocks1 = blocks0 + tl.cdiv(end1 - end0, BLOCK_N)
        blocks2 = blocks1 + tl.cdiv(end2 - end1, BLOCK_N)
        segment = tl.where(block >= blocks2, 3, tl.where(block >= blocks1, 2, 1))
        segment = tl.where(block >= blocks0, segment, 0)
        before = tl.where(segment == 3, blocks2, tl.where(segment == 2, blocks1, blocks0))
        begin = tl.where(segment == 3, end2, tl.where(segment == 2, end1, end0))
        stop = tl.where(segment == 3, end3, tl.where(segment == 2, end2, end1))
        before, begin = tl.where(segment == 0, 0, before), tl.where(segment == 0, 0, begin)
        stop = tl.where(segment == 0, end0, stop)
        column = begin + (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = column < stop
        n = column.to(tl.int64)
        r = tl.arange(0, BLOCK_R)
        r_ok = r < R
        sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for part in range(PARTS):
            place = h + (part * num_rows + t[:, None]) * RANKS + segment * R + r[None, :]
            sums += tl.load(place, mask=m_ok[:, None] & r_ok[None, :], other=0.0)
        w = tl.load(b + (slot * N + n[None, :]) * R + r[:, None],
                    mask=n_ok[None, :] & r_ok[:, None], other=0.0).to(DOT)  # fmt: skip
        sums *= tl.load(scale + slot)
        delta = tl.dot(sums.to(DOT), w, input_precision="ieee")
        mask = m_ok[:, None] & n_ok[None, :]
        place = y + t[:, None] * y_stride + n[None, :]
        base = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, base + delta, mask=mask)


@torch.library.custom_op("heedful::add_lora_", mutates_args=("y_TN",))
def _op(
    y_TN: Tensor,
    x_TK: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    order_T: Tensor,
    starts_S1: Tensor,
    slots_T: Tensor,
    bounds: list[int],
    fixed_tiles: bool,
) -> None:
    slots, outputs, rank = b.shape
    unsupported = "" if x_TK.dtype in FLOATS and a.dtype in FLOATS else "dtype"
    unsupported = unsupported or ("rank" if rank > _MAX_RANK else "")
    if not runs_triton(_NAME, y_TN, unsupported):
        add_lora_reference_(y_TN, x_TK, LoraWeights(a, b, scale, tuple(bounds)), slots_T)
        return
    num_rows, columns = x_TK.shape
    if num_rows == 0 or rank == 0 or slots == 0:
        return
    ranks = a.shape[1]
    # Parts depend on K alone, so that a row's sum is the same in any batch.
    parts = 2 if INTERPRETED else min(cdiv(columns, _PART_COLUMNS), 8)
    block_k = 32 if INTERPRETED else 128
    per_part = cdiv(cdiv(columns, parts), block_k) * block_k
    parts = cdiv(columns, per_part)
    block_m = 16 if INTERPRETED or fixed_tiles or num_rows <= 256 else 64
    block_r = min(max(16, next_power_of_2(ranks)), 64)
    blocks_m = cdiv(num_rows, block_m)
    h = torch.empty(parts, num_rows, ranks, dtype=torch.float32, device=x_TK.device)
    _shrink_kernel[(blocks_m, parts * cdiv(ranks, block_r), slots)](
        x_TK, a, order_T, starts_S1, h, num_rows, x_TK.stride(0), per_part,
        K=columns, RANKS=ranks, DOT=dot_dtype(a.dtype),
        BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, num_stages=3, **COMPILE,
    )  # fmt: skip
    block_n = 32 if INTERPRETED else 128
    widths = [end - first for first, end in pairwise(bounds)]
    ends = [*bounds[1:], outputs, outputs, outputs][:_MAX_SEGMENTS]
    _expand_kernel[(blocks_m, sum(cdiv(width, block_n) for width in widths), slots)](
        h, b, scale, order_T, starts_S1, y_TN, num_rows, y_TN.stride(0), *ends,
        N=outputs, R=rank, RANKS=ranks, PARTS=parts, DOT=dot_dtype(b.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=max(16, next_power_of_2(rank)),
        num_warps=4, **COMPILE,
    )  # fmt: skip


@_op.register_fake
def _(
    y_TN: Tensor,
    x_TK: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    order_T: Tensor,
    starts_S1: Tensor,
    slots_T: Tensor,
    bounds: list[int],
    fixed_tiles: bool,
) -> None:
    return None

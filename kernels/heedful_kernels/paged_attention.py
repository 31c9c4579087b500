"""Causal attention of new tokens over a paged cache: prefill, decode and both in one batch.

    o_t = sum_j softmax_j(scale q_t . k_j) v_j,   j over the first p_t + 1 positions

with q [T, heads, D], the cache [blocks, block_size, 2, kv_heads, D] (keys, then values, of a
position), block tables int32 [S, N], query_starts int32 [S + 1] and context_lens int32 [S]. The
rows query_starts[s] to query_starts[s + 1] - 1 of q are the last positions of sequence s, whose
context is context_lens[s] long, these rows included: p_t follows from them. Query head h reads
key head h * kv_heads // heads. A sequence of no rows is passed over; one with rows and a context of
0 gets zeros, which is what rows that pad a batch to a fixed size are.

A program computes BLOCK_M rows of (token, query head) that share a key head, so that keys and
values are read once for all heads of a group and for all tokens of a block. Long contexts are split
into parts of split_tokens positions, each a program with its own maximum and sum, which a second
kernel joins. With split_tokens given, parts depend on the sequence alone and one tile serves
decodes and prompts alike, so that a row's bits depend neither on the batch nor on how a prompt was
cut.

Scores and sums are fp32; probabilities are rounded to the cache's dtype for the second product.
Pure functions, any thread. Inference only.
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
    next_power_of_2,
    num_multiprocessors,
    refuse_unless,
    runs_triton,
    tl,
)

_NAME: Final = "paged_attention"
_MAX_HEAD_DIM: Final = 256
_LOG2E: Final = 1.4426950408889634
# Positions of a part when the batch alone does not fill the device.
_SPLIT_TOKENS: Final = 512
# Rows of the one tile for results that do not depend on the batch.
_FIXED_ROWS: Final = 64


def paged_attention(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SN: Tensor,
    query_starts_S1: Tensor,
    context_lens_S: Tensor,
    *,
    scale: float,
    max_query_tokens: int,
    max_context_tokens: int,
    split_tokens: int = 0,
) -> Tensor:
    """Attention outputs [T, heads, D] in the dtype of q.

    Args:
        q_THD: rotated queries, bf16, fp16 or fp32, unit stride along D; D at most 256.
        cache: keys and values of q's dtype, contiguous.
        block_tables_SN: block ids; entries beyond a context are never read.
        query_starts_S1: first row of each sequence, and T.
        context_lens_S: positions of each sequence.
        scale: of the scores.
        max_query_tokens: the most rows of one sequence; more programs than that are not started.
        max_context_tokens: no context is longer.
        split_tokens: positions per part, a multiple of 64; 0 leaves parts and tiles to the batch.

    Raises:
        RefusedInputError: shapes, dtypes or strides do not go together.
    """
    _check(q_THD, cache, block_tables_SN, query_starts_S1, context_lens_S, split_tokens)
    out: Tensor = _op(
        q_THD,
        cache,
        block_tables_SN,
        query_starts_S1,
        context_lens_S,
        scale,
        max_query_tokens,
        max_context_tokens,
        split_tokens,
    )
    return out


def paged_attention_reference(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SN: Tensor,
    query_starts_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
) -> Tensor:
    """The formula by torch's own operator, a sequence at a time."""
    out_THD = torch.zeros_like(q_THD)
    starts, lens = query_starts_S1.tolist(), context_lens_S.tolist()
    group = q_THD.shape[1] // cache.shape[3]
    for idx, length in enumerate(lens):
        first, end = starts[idx], starts[idx + 1]
        if end == first or length == 0:
            continue
        blocks = block_tables_SN[idx, : cdiv(length, cache.shape[1])].long()
        k, v = cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=2).unbind(1)
        position = torch.arange(length - (end - first), length, device=q_THD.device)
        visible = torch.arange(length, device=q_THD.device) <= position[:, None]
        out_THD[first:end] = F.scaled_dot_product_attention(
            q_THD[first:end].transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            attn_mask=visible,
            scale=scale,
        ).transpose(0, 1)
    return out_THD


def _check(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SN: Tensor,
    query_starts_S1: Tensor,
    context_lens_S: Tensor,
    split_tokens: int,
) -> None:
    refuse_unless(
        cache.dim() == 5 and cache.shape[2] == 2 and cache.is_contiguous(),
        _NAME,
        f"cache must be contiguous [blocks, block_size, 2, kv_heads, D], not {tuple(cache.shape)}",
    )
    refuse_unless(
        q_THD.dim() == 3 and q_THD.shape[2] == cache.shape[4] and q_THD.stride(2) == 1,
        _NAME,
        f"q must be [T, heads, {cache.shape[4]}] with unit stride, not {tuple(q_THD.shape)}",
    )
    refuse_unless(
        q_THD.shape[1] % cache.shape[3] == 0 and q_THD.shape[1] > 0,
        _NAME,
        f"{q_THD.shape[1]} query heads are no multiple of {cache.shape[3]} key heads",
    )
    refuse_unless(q_THD.dtype == cache.dtype, _NAME, f"q {q_THD.dtype}, cache {cache.dtype}")
    integers = (block_tables_SN, query_starts_S1, context_lens_S)
    refuse_unless(
        all(tensor.dtype == torch.int32 for tensor in integers)
        and block_tables_SN.dim() == 2
        and block_tables_SN.stride(1) == 1
        and query_starts_S1.shape == (len(block_tables_SN) + 1,)
        and context_lens_S.shape == (len(block_tables_SN),),
        _NAME,
        "block tables [S, N], query starts [S + 1] and context lengths [S] must be int32",
    )
    refuse_unless(
        split_tokens >= 0 and split_tokens % 64 == 0, _NAME, f"split_tokens {split_tokens}"
    )


@jit
def _sequence_of_block(starts, block, num_sequences, BLOCK_Q: tl.constexpr):  # type: ignore[no-untyped-def]
    # Sequence s owns query blocks from starts[s] // BLOCK_Q + s on: the last s with that start
    # at or below block.
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low


@jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, cache, tables, starts, lens, out, partial, stats,
    num_sequences, q_stride, head_stride, table_stride, num_rows, qk_scale, split_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, DOT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    s = _sequence_of_block(starts, block, num_sequences, BLOCK_Q)
    first = tl.load(starts + s)
    num_queries = tl.load(starts + s + 1) - first
    q0 = (block - (first // BLOCK_Q + s)) * BLOCK_Q
    context = tl.load(lens + s)
    begin = part * split_tokens
    # Positions that the block's last row sees.
    seen = tl.minimum(context, context - num_queries + q0 + BLOCK_Q)
    if (q0 < num_queries) & ((begin < seen) | (part == 0)):
        m_row = tl.arange(0, BLOCK_M)
        query, head = q0 + m_row // GROUP, kv_head * GROUP + m_row % GROUP
        row_ok = (m_row < BLOCK_Q * GROUP) & (query < num_queries)
        t = (first + query).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        q_md = tl.load(q + t[:, None] * q_stride + head[:, None] * head_stride + d[None, :],
                       mask=row_ok[:, None] & (d[None, :] < D), other=0.0).to(DOT)  # fmt: skip
        position = context - num_queries + query
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        stop = tl.minimum(seen, begin + split_tokens)
        for n0 in range(begin, stop, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            n_ok = n < stop
            place = tl.load(tables + s * table_stride + n // BLOCK_SIZE, mask=n_ok, other=0)
            slot = place.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
            base = cache + slot * (2 * KV_HEADS * D) + kv_head * D
            k = tl.load(base[None, :] + d[:, None],
                        mask=n_ok[None, :] & (d[:, None] < D), other=0.0).to(DOT)  # fmt: skip
            scores = tl.dot(q_md, k, input_precision="ieee") * qk_scale
            visible = n_ok[None, :] & (n[None, :] <= position[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            # A row that has seen nothing yet must not compute -inf - -inf.
            anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
            p = tl.exp2(scores - anchor[:, None])
            decay = tl.exp2(best - anchor)
            total = total * decay + tl.sum(p, 1)
            v = tl.load(base[:, None] + KV_HEADS * D + d[None, :],
                        mask=n_ok[:, None] & (d[None, :] < D), other=0.0).to(DOT)  # fmt: skip
            acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision="ieee")
            best = new_best
        row = t * HEADS + head
        if SPLIT:
            place = part.to(tl.int64) * num_rows + row
            tl.store(stats + place * 2, best, mask=row_ok)
            tl.store(stats + place * 2 + 1, total, mask=row_ok)
            tl.store(partial + place[:, None] * D + d[None, :], acc,
                     mask=row_ok[:, None] & (d[None, :] < D))  # fmt: skip
        else:
            o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + row[:, None] * D + d[None, :], o,
                     mask=row_ok[:, None] & (d[None, :] < D))  # fmt: skip


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    partial, stats, starts, lens, out, num_sequences, num_rows, split_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = row // HEADS
    # The last sequence that starts at or before row t; of those without rows none does.
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= t:
            low = middle
        else:
            high = middle
    num_parts = tl.cdiv(tl.load(lens + low) - (tl.load(starts + low + 1) - t - 1), split_tokens)
    d = tl.arange(0, BLOCK_D)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for p0 in range(0, num_parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        p_ok = p < num_parts
        place = p.to(tl.int64) * num_rows + row
        m = tl.load(stats + place * 2, mask=p_ok, other=float("-inf"))
        s = tl.load(stats + place * 2 + 1, mask=p_ok, other=0.0)
        new_best = tl.maximum(best, tl.max(m, 0))
        weight = tl.exp2(m - new_best)
        decay = tl.exp2(best - new_best)
        o = tl.load(partial + place[:, None] * D + d[None, :],
                    mask=p_ok[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
        acc = acc * decay + tl.sum(o * weight[:, None], 0)
        total = total * decay + tl.sum(s * weight, 0)
        best = new_best
    tl.store(out + row * D + d, acc / tl.where(total == 0.0, 1.0, total), mask=d < D)


def _tiles(q_THD: Tensor, kv_heads: int, max_query_tokens: int, *, fixed: bool) -> dict[str, Any]:
    group, d = q_THD.shape[1] // kv_heads, q_THD.shape[2]
    smallest = max(16, next_power_of_2(group))
    if INTERPRETED:
        block_m, block_n = smallest, 16
    else:
        wanted = _FIXED_ROWS if fixed else next_power_of_2(max_query_tokens * group)
        block_m = max(smallest, min(128 if d <= 128 else 64, wanted))
        block_n = 64 if q_THD.element_size() == 2 and d <= 128 else 32
    return {
        "BLOCK_D": max(16, next_power_of_2(d)),
        "BLOCK_Q": block_m // group,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_m >= 128 else 4,
        "num_stages": 3 if q_THD.element_size() == 2 and d <= 128 else 2,
    }


def _num_parts(programs: int, max_context_tokens: int, split_tokens: int, device: Any) -> int:
    if split_tokens:
        return cdiv(max_context_tokens, split_tokens)
    if programs >= 2 * num_multiprocessors(device):
        return 1
    return cdiv(max_context_tokens, _SPLIT_TOKENS)


@torch.library.custom_op("heedful::paged_attention", mutates_args=())
def _op(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SN: Tensor,
    query_starts_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    max_query_tokens: int,
    max_context_tokens: int,
    split_tokens: int,
) -> Tensor:
    unsupported = "" if q_THD.dtype in FLOATS else "dtype"
    unsupported = unsupported or ("head_size" if q_THD.shape[2] > _MAX_HEAD_DIM else "")
    if not runs_triton(_NAME, q_THD, unsupported):
        return paged_attention_reference(
            q_THD, cache, block_tables_SN, query_starts_S1, context_lens_S, scale
        )
    num_tokens, heads, d = q_THD.shape
    kv_heads, num_sequences = cache.shape[3], len(context_lens_S)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0:
        return out_THD
    tiles = _tiles(q_THD, kv_heads, max_query_tokens, fixed=split_tokens > 0)
    # Every sequence's last block may be partly empty, and where each begins is known on the device.
    blocks = min(num_tokens // tiles["BLOCK_Q"] + num_sequences, num_tokens + num_sequences)
    parts = _num_parts(blocks * kv_heads, max_context_tokens, split_tokens, q_THD.device)
    per_part = split_tokens or (_SPLIT_TOKENS if parts > 1 else max(max_context_tokens, 1))
    rows = num_tokens * heads
    stats = q_THD.new_empty((parts, rows, 2) if parts > 1 else (0,), dtype=torch.float32)
    partial = q_THD.new_empty((parts, rows, d) if parts > 1 else (0,), dtype=torch.float32)
    _attend_kernel[(blocks, kv_heads, parts)](
        q_THD, cache, block_tables_SN, query_starts_S1, context_lens_S, out_THD, partial, stats,
        num_sequences, q_THD.stride(0), q_THD.stride(1), block_tables_SN.stride(0), rows,
        scale * _LOG2E, per_part,
        HEADS=heads, KV_HEADS=kv_heads, D=d, BLOCK_SIZE=cache.shape[1], SPLIT=parts > 1,
        DOT=dot_dtype(q_THD.dtype), **tiles, **COMPILE,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(rows,)](
            partial, stats, query_starts_S1, context_lens_S, out_THD, num_sequences, rows, per_part,
            HEADS=heads, D=d, BLOCK_D=tiles["BLOCK_D"], BLOCK_P=4, num_warps=1, **COMPILE,
        )  # fmt: skip
    return out_THD


@_op.register_fake
def _(
    q_THD: Tensor,
    cache: Tensor,
    block_tables_SN: Tensor,
    query_starts_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    max_query_tokens: int,
    max_context_tokens: int,
    split_tokens: int,
) -> Tensor:
    return torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)

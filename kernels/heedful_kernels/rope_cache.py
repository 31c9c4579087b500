"""Rotary positions, per-head norms and the write into the paged cache, for one step's q, k and v.

    q' = rope(norm(q)),  k' = rope(norm(k))          norm only where weights are given
    rope: for a pair (a, b) at frequency p:  a' = a cos_tp - b sin_tp,  b' = b cos_tp + a sin_tp
    cache[slot_t // block_size, slot_t % block_size] = (k', v)

with qkv [T, (heads + 2 kv_heads) D] (one linear layer's output), cos and sin fp32 [T, P] for the
first 2P entries of each head (P = 0: no rotation), slots int64 [T], cache
[blocks, block_size, 2, kv_heads, D] (keys, then values, of a position). Pairs are neighbours
(2p, 2p + 1) or halves (p, p + P). A negative slot writes nothing: rows that pad a batch have it.
Returned are the rotated queries [T, heads, D]; qkv is left as it is.

fp32 inside, one rounding. Pure functions but for the cache, any thread. Inference only.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    jit,
    next_power_of_2,
    refuse_unless,
    runs_triton,
    tl,
)

_NAME: Final = "rope_cache"


def rope_cache(
    qkv_TQ: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    *,
    num_heads: int,
    neighbours: bool,
    norm_weight_ND: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Return rotated queries [T, heads, D]; write rotated keys and the values into their slots.

    Args:
        qkv_TQ: queries, keys and values side by side, bf16, fp16 or fp32, unit stride along rows.
        cos_TP: cosines of the rotated pairs, fp32, contiguous; [T, 0] rotates nothing.
        sin_TP: their sines.
        slots_T: int64, block id * block size + offset, distinct; negative ones write nothing.
        cache: [blocks, block_size, 2, kv_heads, D], contiguous, of qkv's dtype.
        num_heads: query heads, a multiple of kv_heads.
        neighbours: whether partners sit side by side, else a half of the rotated part apart.
        norm_weight_ND: RMS weights [heads + kv_heads, D] of query and key heads.
        eps: of that norm.

    Raises:
        RefusedInputError: shapes, dtypes or strides do not go together.
    """
    _check(qkv_TQ, cos_TP, sin_TP, slots_T, cache, num_heads, norm_weight_ND)
    out: Tensor = _op(
        qkv_TQ, cos_TP, sin_TP, slots_T, cache, num_heads, neighbours, norm_weight_ND, eps
    )
    return out


def rope_cache_reference(
    qkv_TQ: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    num_heads: int,
    neighbours: bool,
    norm_weight_ND: Tensor | None,
    eps: float,
) -> Tensor:
    """The formulas in torch operators."""
    kv_heads, d = cache.shape[3:]
    wide = torch.promote_types(qkv_TQ.dtype, torch.float32)
    heads_TND = qkv_TQ.reshape(len(qkv_TQ), num_heads + 2 * kv_heads, d).to(wide)
    qk_TND, v_TKD = heads_TND[:, : num_heads + kv_heads], heads_TND[:, num_heads + kv_heads :]
    if norm_weight_ND is not None:
        inverse = torch.rsqrt(qk_TND.square().mean(dim=-1, keepdim=True) + eps)
        qk_TND = qk_TND * inverse * norm_weight_ND.to(wide)
    qk_TND = _rotated(qk_TND, cos_TP.to(wide), sin_TP.to(wide), neighbours=neighbours)
    qk_TND = qk_TND.to(qkv_TQ.dtype)
    q_THD, k_TKD = qk_TND[:, :num_heads], qk_TND[:, num_heads:]
    written = slots_T >= 0
    pairs = torch.stack((k_TKD, v_TKD.to(cache.dtype)), dim=1)[written]
    cache.view(-1, *cache.shape[2:])[slots_T[written]] = pairs
    return q_THD.contiguous()


def _rotated(x_TND: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, neighbours: bool) -> Tensor:
    rotary_dim = 2 * cos_TP.shape[1]
    part, rest = x_TND[..., :rotary_dim], x_TND[..., rotary_dim:]
    if neighbours:
        a, b = part[..., 0::2], part[..., 1::2]
    else:
        a, b = part.chunk(2, dim=-1)
    cos, sin = cos_TP[:, None], sin_TP[:, None]
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)
    return torch.cat((joined, rest), dim=-1)


def _check(
    qkv_TQ: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    num_heads: int,
    norm_weight_ND: Tensor | None,
) -> None:
    refuse_unless(
        cache.dim() == 5 and cache.shape[2] == 2 and cache.is_contiguous(),
        _NAME,
        f"cache must be contiguous [blocks, block_size, 2, kv_heads, D], not {tuple(cache.shape)}",
    )
    kv_heads, d = cache.shape[3:]
    refuse_unless(
        qkv_TQ.dim() == 2 and qkv_TQ.shape[1] == (num_heads + 2 * kv_heads) * d,
        _NAME,
        f"qkv must be [T, {(num_heads + 2 * kv_heads) * d}], not {tuple(qkv_TQ.shape)}",
    )
    refuse_unless(
        num_heads % kv_heads == 0, _NAME, f"{num_heads} heads are no multiple of {kv_heads}"
    )
    refuse_unless(qkv_TQ.dtype == cache.dtype, _NAME, f"qkv {qkv_TQ.dtype}, cache {cache.dtype}")
    refuse_unless(qkv_TQ.stride(1) == 1, _NAME, "rows of qkv must be contiguous")
    refuse_unless(
        cos_TP.shape == sin_TP.shape
        and cos_TP.dim() == 2
        and len(cos_TP) == len(qkv_TQ)
        and 2 * cos_TP.shape[1] <= d
        and cos_TP.is_contiguous()
        and sin_TP.is_contiguous(),
        _NAME,
        f"cos {tuple(cos_TP.shape)} and sin {tuple(sin_TP.shape)} must be contiguous [T, P], "
        f"P at most {d // 2}",
    )
    refuse_unless(
        slots_T.dtype == torch.int64 and slots_T.shape == qkv_TQ.shape[:1],
        _NAME,
        f"slots must be int64 [T], not {slots_T.dtype} {tuple(slots_T.shape)}",
    )
    refuse_unless(
        norm_weight_ND is None or norm_weight_ND.shape == (num_heads + kv_heads, d),
        _NAME,
        f"norm weights must be [{num_heads + kv_heads}, {d}]",
    )


@jit
def _kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, slots, cache, norm_weight, q_out,
    qkv_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    NEIGHBOURS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    ok = d < D
    row = qkv + t * qkv_stride + head * D
    x = tl.load(row + d, mask=ok, other=0.0).to(tl.float32)
    is_value = head >= HEADS + KV_HEADS
    turns = d < tl.where(is_value, 0, 2 * P)
    if NEIGHBOURS:
        partner, pair = d ^ 1, d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner, pair = tl.where(d < P, d + P, d - P), tl.where(d < P, d, d - P)
        sign = tl.where(d < P, -1.0, 1.0)
    other = tl.load(row + partner, mask=turns, other=0.0).to(tl.float32)
    if NORM and not is_value:
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        weights = norm_weight + head * D
        x = x * inverse * tl.load(weights + d, mask=ok, other=0.0).to(tl.float32)
        other_weight = tl.load(weights + partner, mask=turns, other=0.0).to(tl.float32)
        other = other * inverse * other_weight
    c = tl.load(cos + t * P + pair, mask=turns, other=1.0)
    s = tl.load(sin + t * P + pair, mask=turns, other=0.0)
    y = x * c + sign * other * s
    if head < HEADS:
        tl.store(q_out + (t * HEADS + head) * D + d, y, mask=ok)
    else:
        # A position holds the key heads, then the value heads: one run of 2 * KV_HEADS * D.
        slot = tl.load(slots + t)
        place = cache + slot * (2 * KV_HEADS * D) + (head - HEADS) * D
        tl.store(place + d, y, mask=d < tl.where(slot >= 0, D, 0))


@torch.library.custom_op("heedful::rope_cache", mutates_args=("cache",))
def _op(
    qkv_TQ: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    num_heads: int,
    neighbours: bool,
    norm_weight_ND: Tensor | None,
    eps: float,
) -> Tensor:
    if not runs_triton(_NAME, qkv_TQ, "" if qkv_TQ.dtype in FLOATS else "dtype"):
        return rope_cache_reference(
            qkv_TQ, cos_TP, sin_TP, slots_T, cache, num_heads, neighbours, norm_weight_ND, eps
        )
    kv_heads, d = cache.shape[3:]
    q_THD = torch.empty(len(qkv_TQ), num_heads, d, dtype=qkv_TQ.dtype, device=qkv_TQ.device)
    if len(qkv_TQ) == 0:
        return q_THD
    normed = norm_weight_ND is not None
    _kernel[(len(qkv_TQ), num_heads + 2 * kv_heads)](
        qkv_TQ, cos_TP, sin_TP, slots_T, cache,
        norm_weight_ND.contiguous() if norm_weight_ND is not None else qkv_TQ, q_THD,
        qkv_TQ.stride(0), eps,
        HEADS=num_heads, KV_HEADS=kv_heads, D=d, P=cos_TP.shape[1],
        NEIGHBOURS=neighbours, NORM=normed, BLOCK_D=next_power_of_2(d), num_warps=1, **COMPILE,
    )  # fmt: skip
    return q_THD


@_op.register_fake
def _(
    qkv_TQ: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    num_heads: int,
    neighbours: bool,
    norm_weight_ND: Tensor | None,
    eps: float,
) -> Tensor:
    return qkv_TQ.new_empty(qkv_TQ.shape[0], num_heads, cache.shape[4])

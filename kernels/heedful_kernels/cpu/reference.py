"""The native CPU kernels' arithmetic in plain torch: readable definition and the tests' oracle.

Owns one function per op, with the same integer parts and the same order of groups; float results
differ from the library's by rounding only. Knows nothing of programs or pointers. Slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful_kernels.cpu.buffers import (
    POSITION_TILE,
    Activation,
    Batch,
    KVCache,
    LoraSlots,
    QuantizedRows,
    RopeTable,
)
from heedful_kernels.cpu.packing import GROUP, PackedWeight, unpack_parts

_TINY = 1e-30


def quantize_rows(x_TK: Tensor) -> QuantizedRows:
    """int8 with scale = max|x| / 127 for each row and group of 32; ties round to even.

    A group under 1e-30 becomes zeros with scale 0; a group with a NaN gets a NaN for its scale.
    """
    groups_TGg = x_TK.float().reshape(x_TK.shape[0], -1, GROUP)
    amax_TG = groups_TGg.abs().amax(-1)
    tiny_TG = amax_TG < _TINY
    inverse_TG = torch.where(tiny_TG, torch.zeros_like(amax_TG), 127.0 / amax_TG)
    values = (groups_TGg * inverse_TG[..., None]).round().nan_to_num(0.0).to(torch.int8)
    scale_TG = torch.where(tiny_TG, torch.zeros_like(amax_TG), amax_TG / 127.0)
    return QuantizedRows(values.flatten(-2), scale_TG, values.int().sum(-1).float())


def linear(x: QuantizedRows, weight: PackedWeight, bias_N: Tensor | None = None) -> Tensor:
    """y = sum over groups, in order, of scale * (d * dot + m * sum), with dot an exact integer."""
    q_NGg, d_NG, m_NG = unpack_parts(weight)
    rows, groups = x.values.shape[0], weight.k // GROUP
    values_TGg = x.values.reshape(rows, groups, GROUP)
    y_TN = torch.zeros(rows, weight.n)
    for g in range(groups):
        # Below 2^24 fp32 holds every integer, so this matmul is exact.
        dot_TN = values_TGg[:, g].float() @ q_NGg[:, g].float().T
        value_TN = d_NG[:, g] * dot_TN + m_NG[:, g] * x.sums[:, g, None]
        y_TN += x.scale[:, g, None] * value_TN
    return y_TN if bias_N is None else y_TN + bias_N


def norm(
    x_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    bias_H: Tensor | None = None,
    centered: bool = False,
) -> Tensor:
    """RMSNorm, or LayerNorm when `centered`."""
    if centered:
        x_TH = x_TH - x_TH.mean(-1, keepdim=True)
    y_TH = x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps) * weight_H
    return y_TH if bias_H is None else y_TH + bias_H


def activation(x: Tensor, kind: Activation) -> Tensor:
    """The feed-forward's non-linearity; the gated ones read [gate | up]."""
    functional = torch.nn.functional
    if kind is Activation.RELU:
        return x.relu()
    if not kind.gated:
        approximate = "tanh" if kind is Activation.GELU_TANH else "none"
        return functional.gelu(x, approximate=approximate)
    gate, up = x.chunk(2, dim=-1)
    if kind is Activation.SWIGLU:
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def rope_kv(
    qkv: Tensor,
    cache: KVCache,
    batch: Batch,
    *,
    q_heads: int,
    rope: RopeTable | None,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The rotated copy of qkv; writes k and v of every row with a slot to the cache, as bf16."""
    d, rows = cache.head_dim, qkv.shape[0]
    heads = qkv.reshape(rows, -1, d).clone()
    kv_heads = cache.kv_heads
    for part, weight in (
        (heads[:, :q_heads], q_norm_D),
        (heads[:, q_heads : q_heads + kv_heads], k_norm_D),
    ):
        if weight is not None:
            part.copy_(norm(part, weight, eps))
        if rope is not None:
            part.copy_(_rotate(part, rope, batch.positions))
    for t, slot in enumerate(batch.slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, cache.block_size)
        k, v = heads[t, q_heads : q_heads + kv_heads], heads[t, q_heads + kv_heads :]
        stripe, lane = divmod(offset, POSITION_TILE)
        cache.keys[block, :, stripe, :, lane] = k.reshape(kv_heads, d // 2, 2).bfloat16()
        cache.values[block, :, offset] = 0
        cache.values[block, :, offset, :d] = v.bfloat16()
    return heads.reshape(qkv.shape)


def attention(
    qkv: Tensor, cache: KVCache, batch: Batch, *, q_heads: int, scale: float | None = None
) -> Tensor:
    """softmax(q . K * scale) V of each row over positions 0..its own, in fp64."""
    d, kv_heads, rows = cache.head_dim, cache.kv_heads, qkv.shape[0]
    out = torch.zeros(rows, q_heads * d)
    for t in range(rows):
        length = int(batch.positions[t]) + 1
        keys, values = _gather_cache(cache, batch.block_tables[int(batch.sequence[t])], length)
        q = qkv[t, : q_heads * d].reshape(kv_heads, q_heads // kv_heads, d).double()
        scores = torch.einsum("hgd,hsd->hgs", q, keys) * (d**-0.5 if scale is None else scale)
        out[t] = torch.einsum("hgs,hsd->hgd", scores.softmax(-1), values).flatten().float()
    return out


def lora(x_TK: Tensor, slots: LoraSlots, lora_slot: Tensor, y_TN: Tensor) -> Tensor:
    """y_t + scale_s * B_s (A_s x_t) for every row with a slot, segment by segment."""
    out_TN = y_TN.clone()
    for t, slot in enumerate(lora_slot.tolist()):
        if slot < 0:
            continue
        rank, start = int(slots.ranks[slot]), 0
        a_SRK, b_NR = _unpaired_slot(slots, slot)
        for segment, end in enumerate(slots.segment_ends):
            h = a_SRK[segment, :rank] @ x_TK[t]
            out_TN[t, start:end] += slots.scales[slot] * (b_NR[start:end, :rank] @ h)
            start = end
    return out_TN


def argmax_lse(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest best id (-1 where the row holds a NaN), maximum and log-sum-exp."""
    bad_R = logits_RV.isnan().any(-1)
    best_R = logits_RV.amax(-1)
    argmax_R = (logits_RV == best_R[:, None]).int().argmax(-1).int()
    argmax_R = torch.where(bad_R, torch.full_like(argmax_R, -1), argmax_R)
    return argmax_R, best_R, logits_RV.double().logsumexp(-1).float()


def _unpaired_slot(slots: LoraSlots, slot: int) -> tuple[Tensor, Tensor]:
    """A slot's A [segments, rank, K] and B [N, rank] in fp32, the rank rounded up to 16."""
    segments, padded = len(slots.segment_ends), -(-int(slots.ranks[slot]) // 16) * 16
    a_TK = _unpaired(slots.a[slot, : segments * padded * slots.k], slots.k)
    b_TR = _unpaired(slots.b[slot, : slots.n * padded], padded) if padded else torch.zeros(0)
    return a_TK.reshape(segments, padded, slots.k), b_TR.reshape(slots.n, padded)


def _unpaired(packed: Tensor, columns: int) -> Tensor:
    """Flat tiles [columns/2, 16, 2] (for fp32 [columns/2, 2, 16]) to fp32 [tiles, 16, columns]."""
    pair = (16, 2) if packed.dtype == torch.bfloat16 else (2, 16)
    tiles = packed.float().reshape(-1, columns // 2, *pair)
    pairs = tiles if packed.dtype == torch.bfloat16 else tiles.transpose(-1, -2)
    return pairs.transpose(-3, -2).flatten(-2)


def _rotate(heads_Thd: Tensor, rope: RopeTable, positions: Tensor) -> Tensor:
    half = rope.cos.shape[1]
    cos, sin = (table[positions.long()][:, None] for table in (rope.cos, rope.sin))
    a, b = heads_Thd[..., :half], heads_Thd[..., half : 2 * half]
    rest = heads_Thd[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _gather_cache(cache: KVCache, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, fp64 [kv_heads, length, head_dim]."""
    blocks = table[: -(-length // cache.block_size)].long()
    keys = cache.keys[blocks].double().permute(1, 0, 2, 4, 3, 5).flatten(1, 3).flatten(-2)
    values = cache.values[blocks].double().transpose(0, 1).flatten(1, 2)[..., : cache.head_dim]
    return keys[:, :length], values[:, :length]

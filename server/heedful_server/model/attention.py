"""Attention over the paged cache with torch operators.

Owns the grouping of a batch's rows into few calls, the masks, and two ways to compute a group. Keys
and values are gathered block by block into runs that are padded to whole blocks. Pure functions;
they run in the engine child's main thread.

Folded: one scaled_dot_product_attention per group, a chunk's rows and the query heads that share a
key head being one query block. Fastest, but the operator's rounding follows the chunk's length and
where a thread's scratch memory happens to lie.

Exact: every row is a batch entry of its own, in fp32, as a product of at most three query heads
with the keys. Batched products that low were found to give a row the same bits whatever the other
rows, the padding and the chunking (MKL 2024.2 with AVX-512; from four rows on they do not). Heads
narrower than 32 would fall into another code path of torch at short contexts, and need not keep the
promise. tests/server/model/test_invariance.py checks it on the machine at hand.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_server.model.batch import ForwardBatch
from heedful_server.model.spec import DecoderSpec

# Rows of a chunk that share one gathered run in the exact way: shorter runs for early rows against
# more calls.
_CHUNK_ROWS: Final = 64
_EXACT_HEADS: Final = 3


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Rows that are attended to in one call.

    They belong to one sequence each (decodes), or all to one sequence (a prompt chunk).
    """

    rows: slice | Tensor  # of the batch: a run, or int64 indices
    blocks: Tensor  # int32 [S * N], the block tables of the sequences one after another
    num_sequences: int
    mask_RK: Tensor  # rows by padded context: 0, or -inf where hidden; fp32 in the exact way
    padding: Tensor  # int64 rows of the gathered [S * K] that lie beyond the context


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one step's rows are computed; the same for every layer."""

    groups: tuple[AttentionGroup, ...]
    exact: bool


def plan_attention(
    batch: ForwardBatch, block_size: int, dtype: torch.dtype, *, exact: bool
) -> AttentionPlan:
    """Group the rows of a batch, in the compute dtype; done once per step."""
    mask_dtype = torch.float32 if exact else dtype
    decodes, groups = [], []
    for sequence in range(len(batch.context_lens)):
        start, end = batch.query_starts[sequence : sequence + 2]
        if end - start == 1:
            decodes.append(sequence)
            continue
        for first in range(start, end, _CHUNK_ROWS if exact else end - start):
            rows = slice(first, min(first + _CHUNK_ROWS, end) if exact else end)
            # Later rows of the chunk are not seen by these.
            length = batch.context_lens[sequence] - (end - rows.stop)
            groups.append(_group(batch, rows, [sequence], length, block_size, mask_dtype))
    for sequences in _similar_lengths(decodes, batch.context_lens):
        starts = [batch.query_starts[s] for s in sequences]
        decode_rows = _run_or_indices(starts, batch.positions_T.device)
        length = max(batch.context_lens[s] for s in sequences)
        groups.append(_group(batch, decode_rows, sequences, length, block_size, mask_dtype))
    return AttentionPlan(tuple(groups), exact)


def attend(q_TQ: Tensor, kv_blocks: Tensor, plan: AttentionPlan, spec: DecoderSpec) -> Tensor:
    """Attention outputs [T, q_size] of query rows [T, q_size]; kv_blocks as in `KVCache.blocks`."""
    compute = _attend_exactly if plan.exact else _attend_folded
    groups = plan.groups
    if len(groups) == 1 and isinstance(groups[0].rows, slice):
        return compute(q_TQ, _gather(kv_blocks, groups[0], spec), groups[0], spec)
    out_TQ = torch.empty(q_TQ.shape, dtype=q_TQ.dtype, device=q_TQ.device)
    for group in groups:
        kv = _gather(kv_blocks, group, spec)
        out_TQ[group.rows] = compute(q_TQ[group.rows], kv, group, spec)
    return out_TQ


def _gather(kv_blocks: Tensor, group: AttentionGroup, spec: DecoderSpec) -> Tensor:
    """Keys and values [2, S, kv heads, K, head_dim], a permuted view of a fresh tensor."""
    kv = kv_blocks.index_select(0, group.blocks).view(-1, 2 * spec.kv_size)
    # Padding holds what other sequences left: a NaN there would survive the mask, as 0 * NaN.
    kv.index_fill_(0, group.padding, 0)
    runs = kv.view(group.num_sequences, -1, 2, spec.num_kv_heads, spec.head_dim)
    return runs.permute(2, 0, 3, 1, 4)


def _attend_folded(q_RQ: Tensor, kv: Tensor, group: AttentionGroup, spec: DecoderSpec) -> Tensor:
    rows, kv_heads, d = q_RQ.shape[0], spec.num_kv_heads, spec.head_dim
    k, v = kv.unbind(0)
    q = q_RQ.view(rows, kv_heads, -1, d)
    if group.num_sequences == rows:
        mask = group.mask_RK[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.attention_scale)
        return out.reshape(rows, -1)
    mask = group.mask_RK.repeat_interleave(q.shape[2], 0)
    q = q.transpose(0, 1).flatten(1, 2)[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.attention_scale)
    return out.view(kv_heads, rows, -1, d).transpose(0, 1).reshape(rows, -1)


def _attend_exactly(q_RQ: Tensor, kv: Tensor, group: AttentionGroup, spec: DecoderSpec) -> Tensor:
    rows, kv_heads, d = q_RQ.shape[0], spec.num_kv_heads, spec.head_dim
    k, v = torch.empty(kv.shape, dtype=torch.float32).copy_(kv).unbind(0)
    q = q_RQ.float().view(rows, kv_heads, -1, d)
    scale = spec.attention_scale
    if group.num_sequences == rows:
        mask = group.mask_RK.repeat_interleave(kv_heads, 0)[:, None]
        out = _weigh(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scale)
        return out.view(rows, -1).to(q_RQ.dtype)
    out = torch.empty(q.shape, dtype=q_RQ.dtype)
    for head in range(kv_heads):
        # The rows share keys by a stride of 0.
        k_RKD, v_RKD = k[0, head].expand(rows, -1, -1), v[0, head].expand(rows, -1, -1)
        out[:, head] = _weigh(q[:, head], k_RKD, v_RKD, group.mask_RK[:, None], scale)
    return out.view(rows, -1)


def _weigh(q_BGD: Tensor, k_BKD: Tensor, v_BKD: Tensor, mask_B1K: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v, [B, G, D], by products of few enough query heads."""
    heads = q_BGD.shape[1]
    step = max(size for size in range(1, _EXACT_HEADS + 1) if heads % size == 0)
    parts = []
    for first in range(0, heads, step):
        part = q_BGD[:, first : first + step]
        scores = torch.baddbmm(mask_B1K, part, k_BKD.transpose(1, 2), alpha=scale)
        parts.append(torch.bmm(torch.softmax(scores, dim=-1), v_BKD))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _group(
    batch: ForwardBatch,
    rows: slice | Tensor,
    sequences: list[int],
    length: int,
    block_size: int,
    mask_dtype: torch.dtype,
) -> AttentionGroup:
    """A group over the first `length` positions of its sequences."""
    device = batch.positions_T.device
    num_blocks = -(-length // block_size)
    tables = batch.block_tables_SN[_run_or_indices(sequences, device), :num_blocks]
    keys_K = torch.arange(num_blocks * block_size, device=device)
    hidden_RK = keys_K > batch.positions_T[rows][:, None]
    mask_RK = torch.zeros(hidden_RK.shape, dtype=mask_dtype, device=device)
    mask_RK.masked_fill_(hidden_RK, float("-inf"))
    # Of a chunk's rows the last one sees most; what it does not see is padding.
    padding = hidden_RK.view(len(sequences), -1, keys_K.numel())[:, -1].flatten().nonzero()[:, 0]
    return AttentionGroup(rows, tables.flatten(), len(sequences), mask_RK, padding)


def _run_or_indices(indices: list[int], device: torch.device) -> slice | Tensor:
    # A run is a view of what it selects; anything else costs a copy.
    run = range(indices[0], indices[0] + len(indices))
    if indices == list(run):
        return slice(run.start, run.stop)
    return torch.tensor(indices, device=device)


def _similar_lengths(sequences: list[int], context_lens: tuple[int, ...]) -> list[list[int]]:
    """Split sequences by powers of two of their length, if padding would double the work."""
    if not sequences:
        return []
    lengths = [context_lens[s] for s in sequences]
    if max(lengths) * len(lengths) <= 2 * sum(lengths):
        return [sequences]
    buckets: dict[int, list[int]] = {}
    for sequence, length in zip(sequences, lengths, strict=True):
        buckets.setdefault(length.bit_length(), []).append(sequence)
    return list(buckets.values())

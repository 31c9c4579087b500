"""Attention over rows of many answers that computes only what a token may see.

Owns which queries meet which keys, and the arithmetic. A segment is a prompt, or one answer with
the prompt before it; of K answers side by side in one row, a whole table of scores would be mostly
masked. Segments of like size make a block, which is one batch of small tables:

    O_SL = softmax(Q_SL K_SCᵀ · scale + M_SLC) V_SC

over S segments of at most L queries and C keys. transformers calls it in place of its own, under
the name `BLOCKS`. It knows neither models nor rows. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

BLOCKS: Final = "heedful_blocks"

# Beyond so many keys the tables of the plain arithmetic would fill the memory.
_PLAIN_KEYS = 640
# A block is padded to at most so many times the scores that its segments need.
_MOST_PADDING = 1.3


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens at flat positions [start, end), which see each other causally and all of a context."""

    start: int
    end: int
    context: tuple[int, int]  # flat positions [start, end), empty for a prompt

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys."""
        queries = self.end - self.start
        return queries, queries + self.context[1] - self.context[0]


@dataclass(frozen=True, slots=True)
class Block:
    """S segments padded to L queries and C keys; indices are flat, 0 where padded."""

    query_SL: Tensor
    key_SC: Tensor
    visible_S1LC: Tensor  # true: the query sees the key; a padded query sees the first


@dataclass(frozen=True, slots=True)
class Blocks:
    """All segments of a batch of T tokens, and where each token's output lies behind the blocks."""

    blocks: tuple[Block, ...]
    place_T: Tensor

    def to(self, device: torch.device) -> Blocks:
        """Return them on a device."""
        blocks = (
            Block(b.query_SL.to(device), b.key_SC.to(device), b.visible_S1LC.to(device))
            for b in self.blocks
        )
        return Blocks(tuple(blocks), self.place_T.to(device))


def make_blocks(segments: Sequence[Segment]) -> Blocks:
    """Sort segments into blocks of like size; together they cover every position once."""
    groups = _groups(segments)
    place_T = torch.empty(sum(segment.size[0] for segment in segments), dtype=torch.long)
    blocks, offset = [], 0
    for group in groups:
        block = _block(group)
        for number, segment in enumerate(group):
            first = offset + number * block.query_SL.shape[1]
            place_T[segment.start : segment.end] = torch.arange(first, first + segment.size[0])
        blocks.append(block)
        offset += block.query_SL.numel()
    return Blocks(tuple(blocks), place_T)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    blocks: Blocks,
    fused: bool,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Return what each token gathers, shape [1, T, heads, D], and no table of weights.

    Args:
        module: the layer; not used.
        query: [1, heads, T, D].
        key: [1, key heads, T, D]; heads are a multiple of them.
        value: the shape of ``key``.
        attention_mask: None; who sees whom is in the blocks.
        scaling: of the scores.
        blocks: the layout of the T tokens.
        fused: whether PyTorch's fused attention computes them. Without gradients it is faster on a
            CPU; its backward pass is slow there.
        dropout: 0; nothing is dropped here.
    """
    assert query.shape[0] == 1
    assert attention_mask is None
    assert dropout == 0.0
    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    found = [
        _attend(
            _gather(query_THD, block.query_SL),
            _gather(key_TGD, block.key_SC),
            _gather(value_TGD, block.key_SC),
            block.visible_S1LC,
            scaling,
            fused=fused,
        )
        for block in blocks.blocks
    ]
    return torch.cat(found).index_select(0, blocks.place_T)[None], None


AttentionInterface.register(BLOCKS, block_attention)


def _groups(segments: Sequence[Segment]) -> list[list[Segment]]:
    groups: list[list[Segment]] = []
    most_queries, most_keys, needed = 0, 0, 0  # of the last group
    for segment in sorted(segments, key=lambda s: (*s.size, s.start), reverse=True):
        queries, keys = segment.size
        size = len(groups[-1]) + 1 if groups else 0
        padded = size * most_queries * max(most_keys, keys)
        if groups and padded <= _MOST_PADDING * (needed + queries * keys):
            groups[-1].append(segment)
            most_keys, needed = max(most_keys, keys), needed + queries * keys
        else:
            groups.append([segment])
            most_queries, most_keys, needed = queries, keys, queries * keys
    return groups


def _block(group: Sequence[Segment]) -> Block:
    num_queries = max(segment.size[0] for segment in group)
    num_keys = max(segment.size[1] for segment in group)
    query_SL = torch.zeros(len(group), num_queries, dtype=torch.long)
    key_SC = torch.zeros(len(group), num_keys, dtype=torch.long)
    visible = torch.zeros(len(group), 1, num_queries, num_keys, dtype=torch.bool)
    visible[..., 0] = True
    for number, segment in enumerate(group):
        queries, keys = segment.size
        own = torch.arange(segment.start, segment.end)
        query_SL[number, :queries] = own
        key_SC[number, :keys] = torch.cat([torch.arange(*segment.context), own])
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        visible[number, 0, :queries, :keys] = causal
    return Block(query_SL, key_SC, visible)


def _gather(x_THD: Tensor, index_SL: Tensor) -> Tensor:
    rows = x_THD.index_select(0, index_SL.flatten())
    return rows.view(*index_SL.shape, *x_THD.shape[1:]).transpose(1, 2)


def _attend(
    query_SHLD: Tensor,
    key_SGCD: Tensor,
    value_SGCD: Tensor,
    visible_S1LC: Tensor,
    scale: float,
    *,
    fused: bool,
) -> Tensor:
    """Return the outputs of one block, shape [S · L, heads, D]."""
    if fused or key_SGCD.shape[2] > _PLAIN_KEYS:
        found = F.scaled_dot_product_attention(
            query_SHLD, key_SGCD, value_SGCD, visible_S1LC, scale=scale, enable_gqa=True
        )
    else:
        found = _plain(query_SHLD, key_SGCD, value_SGCD, visible_S1LC, scale)
    return found.transpose(1, 2).flatten(0, 1)


def _plain(
    query_SHLD: Tensor, key_SGCD: Tensor, value_SGCD: Tensor, visible_S1LC: Tensor, scale: float
) -> Tensor:
    num_segments, num_heads, num_queries, _ = query_SHLD.shape
    group = num_heads // key_SGCD.shape[1]
    # Heads that share keys stand below each other: no key is copied for them.
    query = (query_SHLD * scale).reshape(num_segments, -1, group * num_queries, key_SGCD.shape[3])
    scores = query @ key_SGCD.transpose(2, 3)
    hidden_S1LC = ~visible_S1LC.repeat(1, 1, group, 1)
    scores = scores.masked_fill(hidden_S1LC, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value_SGCD).view_as(query_SHLD)

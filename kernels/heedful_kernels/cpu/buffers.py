"""The tensors that programs work on: quantized rows, paged caches, adapter slots, one step's batch.

Owns shapes, dtypes and layouts. Knows nothing of the library, ops or models. Plain data, used by
the thread that builds and runs programs.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from heedful_kernels.cpu.packing import GROUP, TILE, Arena

POSITION_TILE: Final = 16


class Activation(IntEnum):
    """What stands between a feed-forward's two linears; the GLU ones read [gate | up]."""

    SWIGLU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    GEGLU_TANH = 4

    @property
    def gated(self) -> bool:
        """Whether the input is twice as wide as the output."""
        return self in (Activation.SWIGLU, Activation.GEGLU_TANH)


@dataclass(frozen=True)
class QuantizedRows:
    """int8 rows with one scale per group of 32, and each group's sum of integers.

    values is int8 [rows, K]; scale and sums are fp32 [rows, K/32].
    """

    values: Tensor
    scale: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, rows: int, k: int) -> QuantizedRows:
        """Uninitialised room for `rows` rows of k inputs (a multiple of 32)."""
        return cls(
            torch.empty(rows, k, dtype=torch.int8),
            torch.empty(rows, k // GROUP),
            torch.empty(rows, k // GROUP),
        )


@dataclass(frozen=True)
class KVCache:
    """One layer's paged keys and values, bf16.

    `keys` is [num_blocks, kv_heads, block_size/16, head_dim/2, 16, 2]: 16 positions stand side by
    side, two neighbouring dimensions of each. `values` is [num_blocks, kv_heads, block_size,
    head_dim rounded up to 32]. Copying block b is copying keys[b] and values[b].
    """

    keys: Tensor
    values: Tensor
    head_dim: int

    @classmethod
    def empty(cls, num_blocks: int, kv_heads: int, block_size: int, head_dim: int) -> KVCache:
        """A cache on huge pages; what was never written is never read as a number."""
        keys = (num_blocks, kv_heads, block_size // POSITION_TILE, head_dim // 2, POSITION_TILE, 2)
        values = (num_blocks, kv_heads, block_size, -(-head_dim // 32) * 32)
        key_bytes, value_bytes = 2 * math.prod(keys), 2 * math.prod(values)
        arena = Arena(key_bytes + value_bytes + 64)
        return cls(
            arena.take(key_bytes).view(torch.bfloat16).view(keys),
            arena.take(value_bytes).view(torch.bfloat16).view(values),
            head_dim,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks that the cache holds."""
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """Positions in a block: a multiple of 16."""
        return self.values.shape[2]


@dataclass(frozen=True)
class RopeTable:
    """cos and sin, fp32 [max_positions, rotary_dim/2]; dimension i turns with i + rotary_dim/2."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class LoraSlots:
    """The adapters of one (possibly stacked) linear: y_t += scale_s * B_s (A_s x_t).

    A stacked linear (q|k|v, gate|up) has one segment per part, each with its own A and B. Made by
    `empty`, filled by `load`. A slot may be rewritten whenever no row of a running program has it,
    also while other slots are read. Every slot has room for max_rank, but holds its adapter packed
    by its own rank, rounded up to 16 (`tiles` * 16), at its start: memory that no adapter needs is
    never touched, and what is read is contiguous.

    Attributes:
        a: [slots, room]; a slot is [segments, tiles, K/2, 16, 2] bf16, or fp32 with the last two
            axes swapped.
        b: [slots, room]; a slot is [N/16, tiles * 8, 16, 2], dtype and axes as `a`.
        ranks: int32 [slots]; 0 switches a slot off.
        scales: fp32 [slots].
        segment_ends: where each segment's outputs end; the last is N. Multiples of 16.
        k: inputs.
        max_rank: the largest rank that a slot holds, a multiple of 16.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: Tensor
    segment_ends: tuple[int, ...]
    k: int
    max_rank: int

    @classmethod
    def empty(
        cls,
        slots: int,
        k: int,
        segment_widths: tuple[int, ...],
        max_rank: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> LoraSlots:
        """Slots without adapters; max_rank is rounded up to 16. ValueError on impossible sizes."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"adapters are bf16 or fp32, got {dtype}")
        if k % GROUP or any(width % TILE for width in segment_widths):
            raise ValueError(f"K by {GROUP}, outputs by {TILE}: {k}, {segment_widths}")
        rank = -(-max_rank // TILE) * TILE
        return cls(
            _untouched_zeros(slots, len(segment_widths) * rank * k, dtype),
            _untouched_zeros(slots, sum(segment_widths) * rank, dtype),
            torch.zeros(slots, dtype=torch.int32),
            torch.zeros(slots),
            tuple(itertools.accumulate(segment_widths)),
            k,
            rank,
        )

    @property
    def n(self) -> int:
        """Outputs of all segments together."""
        return self.segment_ends[-1]

    def slot_bytes(self, rank: int) -> int:
        """Bytes of A and B of an adapter of this rank."""
        padded = -(-rank // TILE) * TILE
        return padded * (len(self.segment_ends) * self.k + self.n) * self.a.element_size()

    def load(self, slot: int, a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> None:
        """Puts one adapter into a slot.

        Args:
            slot: which; its old adapter is overwritten.
            a: each segment's A [rank, K], PEFT's `lora_A.weight`; all of one rank.
            b: each segment's B [width, rank], PEFT's `lora_B.weight`.
            scale: PEFT's alpha / rank (or alpha / sqrt(rank)).

        Raises:
            ValueError: the shapes do not fit the slots.
        """
        rank = a[0].shape[0]
        starts = (0, *self.segment_ends)
        widths = [end - start for start, end in itertools.pairwise(starts)]
        wanted = [((rank, self.k), (width, rank)) for width in widths]
        found = [(tuple(x.shape), tuple(y.shape)) for x, y in zip(a, b, strict=True)]
        if rank > self.max_rank or found != wanted:
            raise ValueError(f"adapter shapes {found}, wanted {wanted} up to rank {self.max_rank}")
        padded = -(-rank // TILE) * TILE
        a_SRK = torch.zeros(len(a), padded, self.k)
        a_SRK[:, :rank] = torch.stack([x.float() for x in a])
        b_NR = torch.zeros(self.n, padded)
        b_NR[:, :rank] = torch.cat([x.float() for x in b])
        self.a[slot, : a_SRK.numel()] = self._paired(a_SRK.reshape(-1, TILE, self.k))
        self.b[slot, : b_NR.numel()] = self._paired(b_NR.reshape(self.n // TILE, TILE, padded))
        self.scales[slot] = scale
        self.ranks[slot] = rank

    def _paired(self, x: Tensor) -> Tensor:
        """[.., 16, n] to [.., n/2, 16, 2] (bf16) or [.., n/2, 2, 16] (fp32), flat."""
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-3, -2)
        return (pairs if self.a.dtype == torch.bfloat16 else pairs.transpose(-1, -2)).flatten()


def _untouched_zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages take no memory until they are written to, unlike those of torch.zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # An empty mapping is an error.
    mapping = mmap.mmap(-1, max(rows * columns * dtype.itemsize, 1), flags=flags)
    return torch.frombuffer(mapping, dtype=dtype, count=rows * columns).view(rows, columns)


@dataclass(frozen=True)
class Batch:
    """One step's rows. T of them, R selected; contiguous int32 tensors (slot_mapping is int64).

    Rows of one sequence may stand in any order; a row attends to positions 0..its own, all of which
    were written by earlier runs or by a row of this one. slot_mapping is block * block_size +
    offset, negative to keep nothing. lora_slot -1 means no adapter.
    """

    token_ids: Tensor
    positions: Tensor
    sequence: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    selected_rows: Tensor
    lora_slot: Tensor | None = None

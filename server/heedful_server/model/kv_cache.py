"""The paged key-value cache of the torch decoder.

Owns its memory layout: per layer, slots of one position hold all key heads and then all value
heads, so that a step writes both in one scatter and a block is one contiguous run to gather. Knows
nothing of who uses which block. Touched by the engine child's main thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful_server.model.spec import DecoderSpec
from heedful_server.model.to_device import sent


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values [num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim]."""

    data: Tensor
    # Views of data, made once because slicing per step costs more than some kernels.
    slots: tuple[Tensor, ...]  # per layer [num_blocks * block_size, 2 * kv_size], for writing
    blocks: tuple[Tensor, ...]  # per layer [num_blocks, block_size * 2 * kv_size], for gathering

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return self.data.shape[1]

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return self.data.shape[2]


def allocate_kv_cache(
    spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache of zeros; gathers read slots that nobody wrote, which must hold finite numbers."""
    shape = (spec.num_layers, num_blocks, block_size, 2, spec.num_kv_heads, spec.head_dim)
    data = torch.zeros(shape, dtype=dtype, device=device)
    return KVCache(
        data,
        tuple(layer.view(num_blocks * block_size, 2 * spec.kv_size) for layer in data),
        tuple(layer.view(num_blocks, block_size * 2 * spec.kv_size) for layer in data),
    )


def kv_bytes_per_block(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return spec.num_layers * block_size * 2 * spec.kv_size * dtype.itemsize


def copy_blocks(kv_cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, destination) in every layer; reads all before it writes any."""
    if not pairs:
        return
    sources, destinations = sent(torch.tensor(pairs), kv_cache.data.device).unbind(1)
    kv_cache.data.index_copy_(1, destinations, kv_cache.data.index_select(1, sources))

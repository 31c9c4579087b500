"""Tables that are looked up by row: token and position embeddings.

Owns lookup in dense tables and in GGUF blocks, of which only the rows asked for are expanded.
Immutable after loading; runs in the engine child's main thread.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heedful_server.model.blocks import BlockKind, dequantize_blocks
from heedful_server.model.linear import DenseLinear, Linear


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Rows as floats [N, K], or as blocks uint8 [N, bytes per row]."""

    kind: BlockKind | Literal["dense"]
    data: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return self.data.nbytes

    def rows(self, indices_T: Tensor, dtype: torch.dtype) -> Tensor:
        """A fresh tensor [T, K] of the indexed rows."""
        rows = self.data.index_select(0, indices_T)
        return (rows if self.kind == "dense" else dequantize_blocks(self.kind, rows)).to(dtype)

    def bytes_shared_with(self, head: Linear) -> int:
        """Bytes that a tied head does not take a second time."""
        tied = isinstance(head, DenseLinear) and head.weight.data_ptr() == self.data.data_ptr()
        return self.data.nbytes if tied else 0

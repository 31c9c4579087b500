"""A linear layer whose weights stay in bitsandbytes' NF4 on the GPU.

Owns the wrapping of the packed product as the decoder's `Linear`, and the packing of float weights.
Not nested: a block of 64 weights keeps its fp32 maximum, as bitsandbytes packs by default, so that
stacking several weights' rows packs each as it would be packed alone. Immutable after loading;
called from the engine child's main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from heedful_kernels.bnb_layout import Nf4Weight, quantize_nf4
from heedful_kernels.nf4_matmul import nf4_matmul
from torch import Tensor

from heedful_server.model.weights import NamedWeight

NF4_GROUP: Final = 64


@dataclass(frozen=True, slots=True)
class Nf4Linear:
    """y = x W^T + b with W in NF4."""

    weight: Nf4Weight
    bias: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights, their maxima and the bias."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""
        return nf4_matmul(x_TK, self.weight, self.bias)


def make_nf4_linear(
    parts: Sequence[NamedWeight], biases: Sequence[Tensor], device: torch.device
) -> Nf4Linear:
    """One linear that computes several float weights' outputs side by side.

    Rows must be whole groups, or the parts' blocks would run into each other.
    """
    assert all(part.kind == "dense" and part.shape[1] % NF4_GROUP == 0 for part in parts)
    # Rounded to bf16 first, as bitsandbytes does for a bf16 model.
    rows_NK = torch.cat([part.data.to(device, torch.bfloat16) for part in parts])
    bias = torch.cat([bias.to(device, torch.bfloat16) for bias in biases]) if biases else None
    return Nf4Linear(quantize_nf4(rows_NK, blocksize=NF4_GROUP, nested=False), bias)

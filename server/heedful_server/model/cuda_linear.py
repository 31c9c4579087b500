"""Linear layers whose weights stay in bitsandbytes' NF4 or int8 on the GPU.

Owns the wrapping of the packed products as the decoder's `Linear`, and the packing of float
weights. NF4 is not nested: a block keeps its fp32 maximum, as bitsandbytes packs by default, so
that stacking several weights' rows packs each as it would be packed alone. Int8 goes through fp16
first, as bitsandbytes does. Immutable after loading; called from the engine child's main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from heedful_kernels.bnb_layout import Int8Weight, Nf4Weight, quantize_int8, quantize_nf4
from heedful_kernels.int8_matmul import int8_matmul
from heedful_kernels.nf4_matmul import nf4_matmul
from torch import Tensor

from heedful_server.model.bnb_rows import as_int8, as_nf4
from heedful_server.model.weights import NamedWeight

NF4_GROUP: Final = 64


@dataclass(frozen=True, slots=True)
class Nf4Linear:
    """y = x W^T + b with W in NF4; with fixed tiles a row's bits do not depend on the others."""

    weight: Nf4Weight
    bias: Tensor | None = None
    fixed_tiles: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights, their maxima and the bias."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""
        return nf4_matmul(x_TK, self.weight, self.bias, fixed_tiles=self.fixed_tiles)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """y = x W^T + b with W in int8; with fixed tiles a row's bits do not depend on the others."""

    weight: Int8Weight
    bias: Tensor | None = None
    fixed_tiles: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights, their scales and the bias."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""
        return int8_matmul(x_TK, self.weight, self.bias, fixed_tiles=self.fixed_tiles)


def pack_nf4(
    parts: Sequence[NamedWeight],
    biases: Sequence[Tensor],
    device: torch.device,
    *,
    fixed_tiles: bool,
) -> Nf4Linear:
    """One linear that computes several float weights' outputs side by side, in NF4.

    Rows must be whole groups, or the parts' blocks would run into each other.
    """
    assert all(part.kind == "dense" and part.shape[1] % NF4_GROUP == 0 for part in parts)
    # Rounded to bf16 first, as bitsandbytes does for a bf16 model.
    rows_NK = torch.cat([part.data.to(device, torch.bfloat16) for part in parts])
    weight = quantize_nf4(rows_NK, blocksize=NF4_GROUP, nested=False)
    return Nf4Linear(weight, _joined(biases, device), fixed_tiles)


def pack_int8(
    parts: Sequence[NamedWeight],
    biases: Sequence[Tensor],
    device: torch.device,
    *,
    fixed_tiles: bool,
) -> Int8Linear:
    """One linear that computes several float weights' outputs side by side, in int8."""
    assert all(part.kind == "dense" for part in parts)
    weight = quantize_int8(torch.cat([part.data.to(device, torch.float16) for part in parts]))
    return Int8Linear(weight, _joined(biases, device), fixed_tiles)


def take_packed(
    parts: Sequence[NamedWeight],
    biases: Sequence[Tensor],
    device: torch.device,
    *,
    fixed_tiles: bool,
) -> Nf4Linear | Int8Linear:
    """One linear of weights that a checkpoint holds packed, all in one form (see `are_alike`)."""
    data = torch.cat([part.data.to(device) for part in parts])
    scales = torch.cat([part.scales.to(device) for part in parts if part.scales is not None])
    if parts[0].kind == "nf4":
        return Nf4Linear(as_nf4(data, scales), _joined(biases, device), fixed_tiles)
    return Int8Linear(as_int8(data, scales), _joined(biases, device), fixed_tiles)


def are_alike(parts: Sequence[NamedWeight]) -> bool:
    """Whether the parts are packed in one form and can be computed side by side."""
    kinds = {part.kind for part in parts}
    if len(kinds) > 1 or not kinds <= {"nf4", "int8"}:
        return False
    return len({part.scales.shape[1:] for part in parts if part.scales is not None}) == 1


def _joined(biases: Sequence[Tensor], device: torch.device) -> Tensor | None:
    return torch.cat([bias.to(device, torch.bfloat16) for bias in biases]) if biases else None

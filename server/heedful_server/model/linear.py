"""Linear layers behind one small call, whatever form their weights have.

Owns the two forms of the torch path: dense weights (on a GPU also with a product whose rows do not
depend on each other), and GGUF blocks repacked for torch's 4-bit CPU kernel. A Q4_1 block maps onto
that kernel's groups of 32 directly. A Q8_0 block becomes two 4-bit planes, high and low nibbles,
over the input twice in a row: d q = 16 d (h - 8) + d l. No weight is quantized again; what is lost
is the rounding of each group's scale, and of Q4_1's offset m + 8 d, from fp16 to the kernel's bf16
(at most 2^-8 of each; Q8_0's offset 8 d follows its scale exactly).
Immutable after loading; called from the engine child's main thread.

On an AVX-512 CPU both forms were found bit-invariant in bf16: a row's result does not depend on how
many rows come with it (tests/server/model/test_linear.py checks this on the machine at hand, for
the 4-bit form). fp32 products are not, because the BLAS picks kernels by the number of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from heedful_kernels.dense_matmul import dense_matmul
from torch import Tensor

from heedful_server.model.blocks import GROUP, BlockKind, unpack_q4_1, unpack_q8_0
from heedful_server.model.weights import NamedWeight, WeightKind

# Rows are packed in runs of this many, which bounds the int32 copy that the packing operator wants;
# a multiple of every tile height that the operator uses, so that runs can be joined.
_PACK_ROWS: Final = 4096
_TILE_ROWS: Final = 64


class Linear(Protocol):
    """y = x W^T + b over rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, scales and bias."""

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Float weights [N, K], used as they are; with fixed tiles no row depends on the others."""

    weight: Tensor
    bias: Tensor | None = None
    fixed_tiles: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights and the bias."""
        return _num_bytes(self.weight, self.bias)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N]; x has the dtype of the weights."""
        if self.fixed_tiles:
            return dense_matmul(x_TK, self.weight, self.bias)
        return F.linear(x_TK, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """4-bit planes in torch's packed layout, with bf16 scale and zero per group of 32.

    With two planes the input is repeated, and the second plane holds the low nibbles of 8-bit
    weights.
    """

    packed: Tensor
    scales_and_zeros: Tensor  # bf16 [planes * K / 32, N, 2]
    planes: int
    num_outputs: int
    bias: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the planes, scales, zeros and bias."""
        return _num_bytes(self.packed, self.scales_and_zeros, self.bias)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N]; x is bf16."""
        x = x_TK if self.planes == 1 else x_TK.repeat(1, self.planes)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, GROUP, self.scales_and_zeros
        )
        y_TN: Tensor = y if y.shape[1] == self.num_outputs else y[:, : self.num_outputs]
        return y_TN if self.bias is None else y_TN + self.bias


def make_linear(
    parts: Sequence[NamedWeight],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fixed_tiles: bool = False,
) -> Linear:
    """One linear layer that computes several weights' outputs side by side.

    Parts that are all blocks of one kind stay packed where the kernel can run (bf16 on a CPU); any
    other mix becomes dense in `dtype`, and computed with fixed tiles if asked for.
    """
    bias = torch.cat([bias.to(device, dtype) for bias in biases]) if biases else None
    kind: WeightKind = "dense" if len({part.kind for part in parts}) > 1 else parts[0].kind
    packs_here = dtype == torch.bfloat16 and device.type == "cpu"
    if kind == "dense" or kind == "nf4" or kind == "int8" or not packs_here:
        # cat copies even a single part, so that nothing keeps the file mapped.
        dense = torch.cat([part.dequantize().to(device, dtype) for part in parts])
        return DenseLinear(dense, bias, fixed_tiles)
    return _pack(kind, torch.cat([part.data for part in parts]), bias)


def _pack(kind: BlockKind, blocks_NB: Tensor, bias: Tensor | None) -> PackedLinear:
    num_outputs = blocks_NB.shape[0]
    # The kernel wants whole tiles; rows of zero blocks cost nothing that matters and are cut off.
    padding = -num_outputs % _TILE_ROWS
    if padding:
        blocks_NB = torch.cat((blocks_NB, blocks_NB.new_zeros(padding, blocks_NB.shape[1])))
    packed, scales = [], []
    for start in range(0, blocks_NB.shape[0], _PACK_ROWS):
        nibbles, scales_and_zeros = _planes(kind, blocks_NB[start : start + _PACK_ROWS])
        # The second argument belongs to GPU layouts; the CPU ignores it.
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
        scales.append(scales_and_zeros.to(torch.bfloat16))
    joined = torch.cat(scales).transpose(0, 1).contiguous()
    planes = 1 if kind == "q4_1" else 2
    return PackedLinear(torch.cat(packed), joined, planes, num_outputs, bias)


def _planes(kind: BlockKind, blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Nibbles int32 [N, planes * K], and scale and zero fp32 [N, planes * K / 32, 2].

    The kernel computes w = (nibble - 8) * scale + zero.
    """
    if kind == "q4_1":
        q, d, m = unpack_q4_1(blocks_NB)
        d_rounded = d.to(torch.bfloat16).float()
        # The zero belongs to the rounded scale, so that the error is d's alone and centred.
        return q.int(), torch.stack((d_rounded, m + 8 * d), dim=-1)
    q8, d = unpack_q8_0(blocks_NB)
    nibbles = torch.cat(((q8 >> 4) + 8, q8 & 15), dim=1)
    d_rounded = d.to(torch.bfloat16).float()
    scales = torch.cat((16 * d_rounded, d_rounded), dim=1)
    zeros = torch.cat((torch.zeros_like(d), 8 * d_rounded), dim=1)
    return nibbles.int(), torch.stack((scales, zeros), dim=-1)


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)

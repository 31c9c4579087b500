"""The packed layouts of bitsandbytes, read and written without it: NF4 (nested or not) and int8.

Owns the two records, their construction from a checkpoint's tensors, quantization to the same bytes
that bitsandbytes writes, and dequantization in torch operators. Knows no kernel. Pure functions.

NF4: weight [N, K] flattened in rows; blocks of `blocksize` consecutive values share an absolute
maximum; value i is code[nibble] * absmax[i // blocksize], even i in the high nibble of byte i // 2,
odd i in the low one. Nested ("double quantization"): absmax of a block j is
nested_code[absmax_u8[j]] * nested_absmax[j // nested_blocksize] + nested_offset.
Int8: value = data * scale / 127 with one scale, the row's absolute maximum, for each output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_kernels.launch import refuse_unless

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE_KEY: Final = "quant_state.bitsandbytes__nf4"
_NESTED_BLOCKSIZE: Final = 256
# The 16 values of NF4 (QLoRA, appendix E), as bitsandbytes rounds them.
NF4_CODE: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """A weight [N, K] as bitsandbytes stores it.

    Attributes:
        packed: uint8, ceil(N K / 2) bytes, in any shape.
        absmax: fp32 per block, or uint8 when nested.
        code: fp32 [16].
        shape: (N, K).
        blocksize: values per block.
        nested_absmax: fp32, of blocks of nested_blocksize absmax values; None unless nested.
        nested_code: fp32 [256]; None unless nested.
        nested_offset: fp32 scalar; None unless nested.
        nested_blocksize: absmax values per nested block.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = _NESTED_BLOCKSIZE

    @property
    def num_bytes(self) -> int:
        """Bytes that a product has to read."""
        nested = 0 if self.nested_absmax is None else self.nested_absmax.nbytes
        return self.packed.nbytes + self.absmax.nbytes + nested

    def to(self, device: torch.device) -> Nf4Weight:
        """The same weight on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Nf4Weight(
            self.packed.to(device),
            self.absmax.to(device),
            self.code.to(device),
            self.shape,
            self.blocksize,
            moved(self.nested_absmax),
            moved(self.nested_code),
            moved(self.nested_offset),
            self.nested_blocksize,
        )


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [N, K] as bitsandbytes stores it: int8 data [N, K] (CB) and fp32 scale [N] (SCB)."""

    data: Tensor
    scale: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that a product has to read."""
        return self.data.nbytes + self.scale.nbytes


def nf4_from_checkpoint(packed: Tensor, state: Mapping[str, Tensor]) -> Nf4Weight:
    """The weight of a pre-quantized checkpoint.

    Args:
        packed: the tensor "….weight".
        state: the tensors "….weight.<key>" by key: absmax, quant_map, nested_absmax,
            nested_quant_map and quant_state.bitsandbytes__nf4.

    Raises:
        RefusedInputError: the state is not NF4's, or is incomplete.
    """
    keys = ", ".join(sorted(state))
    refuse_unless(_STATE_KEY in state, "nf4", f"no {_STATE_KEY} among {keys}")
    values = json.loads(bytes(state[_STATE_KEY].tolist()))
    refuse_unless(values["quant_type"] == "nf4", "nf4", f"quant_type {values['quant_type']!r}")
    nested = "nested_offset" in values
    wanted = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    refuse_unless(wanted <= set(state), "nf4", f"need {sorted(wanted)}, found {keys}")
    rows, columns = values["shape"]
    return check_nf4(
        Nf4Weight(
            packed.view(torch.uint8).reshape(-1),
            state["absmax"],
            state["quant_map"].float(),
            (rows, columns),
            values["blocksize"],
            state["nested_absmax"].float() if nested else None,
            state["nested_quant_map"].float() if nested else None,
            torch.tensor(values["nested_offset"], device=packed.device) if nested else None,
            values.get("nested_blocksize", _NESTED_BLOCKSIZE),
        )
    )


def check_nf4(weight: Nf4Weight) -> Nf4Weight:
    """The weight itself.

    Raises:
        RefusedInputError: sizes or dtypes of its tensors do not go together.
    """
    rows, columns = weight.shape
    refuse_unless(weight.blocksize in BLOCKSIZES, "nf4", f"blocksize {weight.blocksize}")
    refuse_unless(
        weight.packed.dtype == torch.uint8 and weight.packed.numel() == -(-rows * columns // 2),
        "nf4",
        f"{weight.packed.numel()} bytes ({weight.packed.dtype}) for a weight {rows} x {columns}",
    )
    blocks = -(-rows * columns // weight.blocksize)
    nested = weight.nested_absmax is not None
    refuse_unless(
        weight.absmax.numel() == blocks
        and weight.absmax.dtype == (torch.uint8 if nested else torch.float32),
        "nf4",
        f"absmax {weight.absmax.dtype} [{weight.absmax.numel()}] for {blocks} blocks",
    )
    refuse_unless(weight.code.shape == (16,), "nf4", f"code {tuple(weight.code.shape)}")
    if nested:
        assert weight.nested_absmax is not None
        refuse_unless(
            weight.nested_code is not None
            and weight.nested_code.shape == (256,)
            and weight.nested_offset is not None
            and weight.nested_absmax.numel() == -(-blocks // weight.nested_blocksize),
            "nf4",
            "nested absmax, code and offset do not go together",
        )
    return weight


def quantize_nf4(weight_NK: Tensor, *, blocksize: int = 64, nested: bool = True) -> Nf4Weight:
    """Quantize to the bytes that bitsandbytes.functional.quantize_4bit writes."""
    refuse_unless(weight_NK.dim() == 2, "nf4", f"weight {tuple(weight_NK.shape)}")
    refuse_unless(blocksize in BLOCKSIZES, "nf4", f"blocksize {blocksize}")
    code = torch.tensor(NF4_CODE, device=weight_NK.device)
    nibbles, absmax = _quantize_blockwise(weight_NK, code, blocksize)
    if nibbles.numel() % 2:
        nibbles = F.pad(nibbles, (0, 1), value=7)  # code 7 is 0.0
    packed = nibbles[::2] << 4 | nibbles[1::2]
    shape = (weight_NK.shape[0], weight_NK.shape[1])
    if not nested:
        return Nf4Weight(packed, absmax, code, shape, blocksize)
    offset = absmax.mean()
    nested_code = dynamic_map().to(weight_NK.device)
    absmax_u8, nested_absmax = _quantize_blockwise(absmax - offset, nested_code, _NESTED_BLOCKSIZE)
    return Nf4Weight(packed, absmax_u8, code, shape, blocksize, nested_absmax, nested_code, offset)


def quantize_int8(weight_NK: Tensor) -> Int8Weight:
    """Quantize to the bytes that bitsandbytes.functional.int8_vectorwise_quant writes."""
    refuse_unless(weight_NK.dim() == 2, "int8", f"weight {tuple(weight_NK.shape)}")
    scale = weight_NK.abs().amax(dim=1).float()
    # A row of zeros has no scale to divide by; its values are zero whatever they are called.
    factor = 127.0 / torch.where(scale > 0, scale, 1.0)
    data = torch.round(weight_NK * factor[:, None]).to(torch.int8)
    return Int8Weight(data, scale)


def nf4_absmax(weight: Nf4Weight) -> Tensor:
    """The blocks' absolute maxima, fp32 [blocks]."""
    if weight.nested_absmax is None:
        return weight.absmax.reshape(-1)
    assert weight.nested_code is not None
    assert weight.nested_offset is not None
    values = weight.nested_code[weight.absmax.reshape(-1).long()]
    factors = weight.nested_absmax.reshape(-1).repeat_interleave(weight.nested_blocksize)
    return values * factors[: len(values)] + weight.nested_offset


def dequantize_nf4_reference(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in torch operators; in fp64 the products are not rounded."""
    rows, columns = weight.shape
    packed = weight.packed.reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: rows * columns]
    wide = torch.promote_types(dtype, torch.float32)
    absmax = nf4_absmax(weight).to(wide).repeat_interleave(weight.blocksize)[: rows * columns]
    return (weight.code.to(wide)[nibbles.long()] * absmax).view(rows, columns).to(dtype)


def dequantize_int8_reference(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in torch operators."""
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.data.to(wide) * (weight.scale.to(wide) / 127.0)[:, None]).to(dtype)


def dynamic_map() -> Tensor:
    """The 256 values that nested statistics are rounded to, fp32, ascending: signed, with seven
    decades of magnitude whose resolution doubles with each.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Indices of the nearest code, uint8, and absolute maxima of the blocks."""
    flat = values.reshape(-1).float()
    padded = F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    edges = (code[:-1] + code[1:]) / 2
    indices = torch.bucketize(scaled.reshape(-1)[: len(flat)], edges, out_int32=True)
    return indices.to(torch.uint8), absmax

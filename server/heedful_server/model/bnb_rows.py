"""bitsandbytes' packed weights by rows, so that rows can be reordered, split and stacked.

Owns the two record forms that a `NamedWeight` carries (NF4: bytes [out, in / 2] and block maxima
fp32 [out, in / blocksize]; int8: data [out, in] and scales fp32 [out]), and the reading of NF4 from
a checkpoint's tensors. Codes stay as they are stored; nested maxima are decoded once, because a
nested block spans rows, and those of several weights would have several offsets side by side.
Knows nothing of files. Pure functions, run while loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from heedful_kernels.bnb_layout import (
    NF4_CODE,
    Int8Weight,
    Nf4Weight,
    dequantize_int8_reference,
    dequantize_nf4_reference,
    nf4_absmax,
    nf4_from_checkpoint,
)
from torch import Tensor

BnbKind = Literal["nf4", "int8"]

NF4_STATE: Final = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class BnbRows:
    """A weight's rows; without scales the data is dense, because its blocks straddle rows."""

    data: Tensor
    scales: Tensor | None
    shape: tuple[int, int]


def nf4_rows(packed: Tensor, state: Mapping[str, Tensor]) -> BnbRows:
    """The rows of a pre-quantized checkpoint's NF4 weight; state as `nf4_from_checkpoint`.

    Raises:
        RefusedInputError: the state is not NF4's, is incomplete or does not fit.
    """
    weight = nf4_from_checkpoint(packed, state)
    rows, columns = weight.shape
    ordinary = torch.tensor(NF4_CODE, device=weight.code.device)
    if columns % weight.blocksize or not torch.allclose(weight.code, ordinary, rtol=0, atol=1e-6):
        return BnbRows(dequantize_nf4_reference(weight, torch.float32), None, weight.shape)
    absmax = nf4_absmax(weight).view(rows, columns // weight.blocksize)
    return BnbRows(weight.packed.view(rows, columns // 2), absmax, weight.shape)


def as_nf4(data: Tensor, scales: Tensor) -> Nf4Weight:
    """Rows as the kernel's record."""
    rows, columns = data.shape[0], 2 * data.shape[1]
    code = torch.tensor(NF4_CODE, device=data.device)
    blocksize = columns // scales.shape[1]
    return Nf4Weight(data.contiguous(), scales.contiguous(), code, (rows, columns), blocksize)


def as_int8(data: Tensor, scales: Tensor) -> Int8Weight:
    """Rows as the kernel's record."""
    return Int8Weight(data.contiguous(), scales.contiguous())


def expand(kind: BnbKind, data: Tensor, scales: Tensor) -> Tensor:
    """The values of rows, fp32 [out, in]."""
    if kind == "nf4":
        return dequantize_nf4_reference(as_nf4(data, scales), torch.float32)
    return dequantize_int8_reference(as_int8(data, scales), torch.float32)

"""Which tensors of a checkpoint belong to a weight that bitsandbytes has packed, and their reading.

Owns the names beside a packed weight ("….weight.absmax", "….SCB", …), the checks of what they hold,
and the splitting of fused ones. Opens no files. Pure functions, run while loading.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import torch
from heedful_kernels.launch import RefusedInputError
from torch import Tensor

from heedful_server.model.bnb_rows import NF4_STATE, BnbKind, BnbRows, nf4_rows
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.names import StoredTensor, split
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight

_NF4_SIDES: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
_INT8_SIDES: Final = (".SCB", ".weight_format")
_WEIGHT: Final = ".weight"


def bnb_kind(name: str, found: Collection[str]) -> BnbKind | None:
    """The form that a weight is packed in, by the names beside it; None for floats."""
    if name + NF4_STATE in found:
        return "nf4"
    return "int8" if name.endswith(_WEIGHT) and _stem(name) + ".SCB" in found else None


def side_names(name: str, found: Collection[str]) -> list[str]:
    """The names of the tensors that a packed weight has beside it."""
    sides = [name + side for side in _NF4_SIDES]
    if name.endswith(_WEIGHT):
        sides += [_stem(name) + side for side in _INT8_SIDES]
    return [side for side in sides if side in found]


def split_packed(
    stored: StoredTensor,
    name: str,
    kind: BnbKind,
    tensors: Mapping[str, Tensor],
    spec: DecoderSpec,
) -> Iterator[NamedWeight]:
    """The canonical weights inside a packed one; tensors holds it and what is beside it.

    Raises:
        BadCheckpoint: sizes or dtypes do not go together.
        UnsupportedModel: the weight is packed in a way that is not read.
    """
    if stored.fusion == "conv1d":
        raise UnsupportedModel(
            "quantization_config", f"{name}: transposed weights are not served pre-quantized"
        )
    rows = _nf4(name, tensors) if kind == "nf4" else _int8(name, tensors)
    if rows.shape != stored.shape:
        raise BadCheckpoint(f"tensor {name} has shape {rows.shape}, expected {stored.shape}")
    columns = rows.shape[1]
    data = split(stored, rows.data, spec)
    if rows.scales is None:
        yield from (NamedWeight(part, "dense", x, tuple(x.shape)) for part, x in data)
        return
    scales = split(stored, rows.scales, spec)
    for (part, x), (_, scale) in zip(data, scales, strict=True):
        yield NamedWeight(part, kind, x, (x.shape[0], columns), scale)


def _nf4(name: str, tensors: Mapping[str, Tensor]) -> BnbRows:
    state = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key != name}
    try:
        return nf4_rows(tensors[name], state)
    except (RefusedInputError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"tensor {name}: {error}") from error


def _int8(name: str, tensors: Mapping[str, Tensor]) -> BnbRows:
    data, scales = tensors[name], tensors[_stem(name) + ".SCB"]
    layout = tensors.get(_stem(name) + ".weight_format")
    if layout is not None and int(layout) != 0:
        raise UnsupportedModel("quantization_config", f"{name}: int8 weights not stored by rows")
    fits = data.ndim == 2 and data.dtype == torch.int8 and scales.numel() == data.shape[0]
    if not fits or not scales.is_floating_point():
        raise BadCheckpoint(
            f"tensor {name}: {data.dtype} {tuple(data.shape)} with {scales.numel()} scales "
            f"({scales.dtype}) is no int8 weight of bitsandbytes"
        )
    return BnbRows(data, scales.reshape(-1).float(), (data.shape[0], data.shape[1]))


def _stem(name: str) -> str:
    return name.removesuffix(_WEIGHT)

"""What a value of `quantize` means for a checkpoint on a device, weight by weight.

Owns the compute dtype, which matrices are quantized and to what, and the forms that packed weights
of a file are served in. Knows neither how weights are read nor how they are computed with. Pure
functions, run while loading and in tools that need the served weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import structlog
import torch
from heedful_kernels.bnb_layout import (
    dequantize_int8_reference,
    dequantize_nf4_reference,
    quantize_int8,
    quantize_nf4,
)
from torch import Tensor

from heedful_server.model.blocks import GROUP, BlockKind, quantize_blocks
from heedful_server.model.bnb_rows import BnbKind
from heedful_server.model.cuda_linear import NF4_GROUP
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.families import read_prequantized
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight, find_gguf, iterate_weights

log = structlog.get_logger(__name__)

QUANTIZE_VALUES: Final = ("auto", "float64", "float32", "bfloat16", "int8", "int4", "nf4")
DTYPE_NAMES: Final = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
}
_DENSE: Final = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
_LAYER_MATRIX: Final = re.compile(r"layers\.\d+\.(q|k|v|o|gate|up|down)")


@dataclass(frozen=True, slots=True)
class WeightMode:
    """How weights are served: the compute dtype, and what becomes of each kind of matrix.

    `keep_blocks`: blocks of a GGUF file stay packed. `layers` and `tables` (embedding and head) say
    what float matrices become; "nf4" and "int8" are bitsandbytes' forms, which stay packed where
    the GPU's kernels compute and else end up dense, as do weights that are `stored` in one.
    """

    dtype: torch.dtype
    keep_blocks: bool
    layers: BlockKind | Literal["dense"] | BnbKind = "dense"
    tables: BlockKind | Literal["dense"] = "dense"
    stored: BnbKind | None = None
    expanded: bool = False  # whether blocks that were asked for have no kernel there

    @property
    def bnb_form(self) -> BnbKind | None:
        """bitsandbytes' form that layers are served in, packed or not."""
        return self.layers if self.layers in ("nf4", "int8") else self.stored


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means on this machine.

    Raises:
        UnsupportedModel: the name is none of these, or there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("engine.device", "cuda was asked for and torch finds no CUDA device")
    if device not in ("cpu", "cuda"):
        raise UnsupportedModel("engine.device", f"{device!r} is none of auto, cpu, cuda")
    return torch.device(device)


def mode_of(model_dir: Path, quantize: str, device: torch.device) -> WeightMode:
    """What a `quantize` value means for a directory on a device; errors as `resolve_mode`."""
    is_gguf = find_gguf(model_dir) is not None
    stored = None if is_gguf else read_prequantized(model_dir)
    return resolve_mode(quantize, is_gguf=is_gguf, device=device, stored=stored)


def resolve_mode(
    quantize: str, *, is_gguf: bool, device: torch.device, stored: BnbKind | None = None
) -> WeightMode:
    """What a `quantize` value means for a checkpoint on a device.

    Args:
        quantize: the setting.
        is_gguf: whether the checkpoint is a GGUF file.
        device: where the model runs.
        stored: bitsandbytes' form that the checkpoint holds its layers in.

    Raises:
        UnsupportedModel: the value is unknown, or makes no sense for this checkpoint.
    """
    if quantize not in QUANTIZE_VALUES:
        raise UnsupportedModel(
            "model.quantize", f"{quantize!r} is none of {', '.join(QUANTIZE_VALUES)}"
        )
    if quantize in _DENSE:
        return WeightMode(_DENSE[quantize], keep_blocks=False)
    if stored is not None:
        return _stored_mode(quantize, stored, device)
    if quantize == "nf4":
        if is_gguf:
            raise UnsupportedModel(
                "model.quantize", "nf4 wants a float checkpoint, not a GGUF file"
            )
        if device.type == "cpu":
            log.warning("nf4 is expanded to bfloat16: it saves no memory on this path")
        return WeightMode(torch.bfloat16, keep_blocks=False, layers="nf4")
    if quantize == "auto" and not is_gguf:
        return WeightMode(_fast_float(device), keep_blocks=False)
    if device.type != "cpu":
        if quantize == "int8" and not is_gguf:
            return WeightMode(torch.bfloat16, keep_blocks=False, layers="int8")
        log.warning("packed weights are expanded to bfloat16 on this device", quantize=quantize)
        return WeightMode(torch.bfloat16, keep_blocks=False, expanded=True)
    # Embedding and head stay at 8 bits even in int4: their rounding goes straight to the logits.
    layers: dict[str, BlockKind | Literal["dense"]] = {
        "auto": "dense",
        "int8": "q8_0",
        "int4": "q4_1",
    }
    tables: BlockKind | Literal["dense"] = "dense" if quantize == "auto" else "q8_0"
    return WeightMode(torch.bfloat16, keep_blocks=True, layers=layers[quantize], tables=tables)


def _stored_mode(quantize: str, stored: BnbKind, device: torch.device) -> WeightMode:
    if quantize not in ("auto", stored):
        raise UnsupportedModel(
            "model.quantize",
            f"the checkpoint is quantized to {stored} already: {quantize!r} would quantize it "
            f"twice; use auto, {stored} or a float type",
        )
    if device.type == "cpu":
        log.warning(
            "the checkpoint's packed weights are expanded to bfloat16: they save no memory "
            "on this path",
            stored=stored,
        )
    return WeightMode(torch.bfloat16, keep_blocks=False, stored=stored)


def served_weights(model_dir: Path, spec: DecoderSpec, mode: WeightMode) -> Iterator[NamedWeight]:
    """The weights of a directory in the form that the mode serves; errors as `load_decoder`."""
    for weight in iterate_weights(model_dir, spec):
        yield served(weight, mode)


def is_layer_matrix(weight: NamedWeight) -> bool:
    """Whether a weight is one of the matrices that most of a model is made of."""
    return _LAYER_MATRIX.fullmatch(weight.name) is not None


def stays_packed(weight: NamedWeight, mode: WeightMode) -> bool:
    """Whether the GPU's kernels take a weight as bitsandbytes packs it, or the file holds it."""
    if weight.kind in ("nf4", "int8"):
        return mode.stored is not None and weight.name != "embed"
    if not is_layer_matrix(weight) or weight.kind != "dense":
        return False
    return mode.layers == "int8" or (mode.layers == "nf4" and weight.shape[1] % NF4_GROUP == 0)


def served(weight: NamedWeight, mode: WeightMode) -> NamedWeight:
    """The weight as torch's operators compute with it."""
    if weight.kind in ("nf4", "int8"):
        expanded = weight.dequantize().to(mode.dtype)
        return replace(weight, kind="dense", data=expanded, scales=None)
    if len(weight.shape) != 2 or weight.name in ("positions", "embed_in", "embed_out"):
        return weight
    if weight.kind != "dense":
        if mode.keep_blocks:
            return weight
        return replace(weight, kind="dense", data=weight.dequantize().to(mode.dtype))
    form = mode.layers if is_layer_matrix(weight) else mode.tables
    if form == "nf4":
        return replace(weight, data=_through_nf4(weight.data))
    if form == "int8":
        return replace(weight, data=_through_int8(weight.data))
    if form == "dense":
        return replace(weight, data=weight.data.to(mode.dtype))
    if weight.shape[1] % GROUP:
        log.warning("kept in bfloat16: rows are no multiple of 32", tensor=weight.name)
        return replace(weight, data=weight.data.to(mode.dtype))
    try:
        return replace(weight, kind=form, data=quantize_blocks(form, weight.data))
    except ValueError as error:
        raise BadCheckpoint(f"tensor {weight.name}: {error}") from error


def _through_nf4(weight_NK: Tensor) -> Tensor:
    packed = quantize_nf4(weight_NK.to(torch.bfloat16), blocksize=NF4_GROUP, nested=False)
    return dequantize_nf4_reference(packed, torch.bfloat16)


def _through_int8(weight_NK: Tensor) -> Tensor:
    return dequantize_int8_reference(quantize_int8(weight_NK.to(torch.float16)), torch.bfloat16)


def _fast_float(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32

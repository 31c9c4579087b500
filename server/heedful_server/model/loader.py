"""Loads a model directory into the weights of a decoder, and into a `TorchDecoder`.

Owns the meaning of `quantize`: which weights become blocks, and in what dtype the rest is computed.
Reads weight by weight and keeps at most one layer beside what is loaded already. Knows nothing of
requests. Runs once in the engine child's main thread, and in tools that need the served weights.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import structlog
import torch
from heedful_kernels.bnb_layout import dequantize_nf4_reference, quantize_nf4
from torch import Tensor

from heedful_server.model.blocks import GROUP, BlockKind, quantize_blocks
from heedful_server.model.cuda_linear import NF4_GROUP, make_nf4_linear
from heedful_server.model.decoder import (
    DecoderWeights,
    LayerWeights,
    TorchDecoder,
    residual_dtype,
)
from heedful_server.model.embedding import EmbeddingTable
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.families import read_spec
from heedful_server.model.linear import DenseLinear, Linear, make_linear
from heedful_server.model.names import stored_tensors
from heedful_server.model.norm import Norm
from heedful_server.model.rope import to_neighbours
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight, find_gguf, iterate_weights

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]

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
_ROTATED: Final = re.compile(r"layers\.\d+\.(q|k)(_norm|\.bias)?")


@dataclass(frozen=True, slots=True)
class WeightMode:
    """How weights are served: the compute dtype, and what becomes of each kind of matrix.

    `keep_blocks`: blocks of the file stay packed. `layers` and `tables` (embedding and head) say
    what float matrices become; "nf4" goes through bitsandbytes' rounding and ends up dense.
    """

    dtype: torch.dtype
    keep_blocks: bool
    layers: BlockKind | Literal["dense", "nf4"] = "dense"
    tables: BlockKind | Literal["dense"] = "dense"


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


def resolve_mode(quantize: str, *, is_gguf: bool, device: torch.device) -> WeightMode:
    """What a `quantize` value means for a checkpoint on a device.

    Raises:
        UnsupportedModel: the value is unknown, or makes no sense for this checkpoint.
    """
    if quantize not in QUANTIZE_VALUES:
        raise UnsupportedModel(
            "model.quantize", f"{quantize!r} is none of {', '.join(QUANTIZE_VALUES)}"
        )
    if quantize in _DENSE:
        return WeightMode(_DENSE[quantize], keep_blocks=False)
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
        log.warning("packed weights are expanded to bfloat16 on this device", quantize=quantize)
        return WeightMode(torch.bfloat16, keep_blocks=False)
    # Embedding and head stay at 8 bits even in int4: their rounding goes straight to the logits.
    layers: dict[str, BlockKind | Literal["dense"]] = {
        "auto": "dense",
        "int8": "q8_0",
        "int4": "q4_1",
    }
    tables: BlockKind | Literal["dense"] = "dense" if quantize == "auto" else "q8_0"
    return WeightMode(torch.bfloat16, keep_blocks=True, layers=layers[quantize], tables=tables)


def load_decoder(model_dir: Path, quantize: str, device: str, progress: Progress) -> TorchDecoder:
    """Load a model directory; progress gets ("weights", share done).

    Raises:
        BadCheckpoint: files or tensors are missing, truncated or of the wrong shape.
        UnsupportedModel: the architecture, or `quantize` on it, is not served.
    """
    spec = read_spec(model_dir)
    target = resolve_device(device)
    mode = resolve_mode(quantize, is_gguf=find_gguf(model_dir) is not None, device=target)
    weights, quantization = load_weights(model_dir, spec, mode, target, progress)
    return TorchDecoder(
        spec,
        weights,
        dtype=mode.dtype,
        device=target,
        quantization=quantization,
        # Dense products round by the number of rows anyway, so only packed modes pay for it.
        exact_attention=mode.keep_blocks,
    )


def load_weights(
    model_dir: Path,
    spec: DecoderSpec,
    mode: WeightMode,
    device: torch.device,
    progress: Progress,
    *,
    pack_nf4: bool = False,
) -> tuple[DecoderWeights, str]:
    """The weights of a directory as a decoder computes with them, and what clients call their form.

    With pack_nf4, matrices of an NF4 mode stay packed for the GPU's kernel where their rows are
    whole groups. Errors as `load_decoder`.
    """
    pack_nf4 = pack_nf4 and mode.layers == "nf4"
    builder = _Builder(spec, mode, device, pack_nf4=pack_nf4)
    progress("weights", 0.0)
    for weight in iterate_weights(model_dir, spec):
        packed = pack_nf4 and packs_nf4(weight)
        builder.add(weight if packed else _served(weight, mode))
        progress("weights", builder.share_done)
    return builder.finish(), builder.quantization


def packs_nf4(weight: NamedWeight) -> bool:
    """Whether the GPU's kernel takes a weight of an NF4 mode as it is packed."""
    is_matrix = _LAYER_MATRIX.fullmatch(weight.name) is not None
    return is_matrix and weight.kind == "dense" and weight.shape[1] % NF4_GROUP == 0


def served_weights(model_dir: Path, spec: DecoderSpec, mode: WeightMode) -> Iterator[NamedWeight]:
    """The weights of a directory in the form that the mode serves; errors as `load_decoder`."""
    for weight in iterate_weights(model_dir, spec):
        yield _served(weight, mode)


def _served(weight: NamedWeight, mode: WeightMode) -> NamedWeight:
    if len(weight.shape) != 2 or weight.name in ("positions", "embed_in", "embed_out"):
        return weight
    if weight.kind != "dense":
        if mode.keep_blocks:
            return weight
        return replace(weight, kind="dense", data=weight.dequantize().to(mode.dtype))
    form = mode.layers if _LAYER_MATRIX.fullmatch(weight.name) else mode.tables
    if form == "nf4":
        return replace(weight, data=_through_nf4(weight.data))
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


def _fast_float(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


class _Builder:
    """Collects weights and turns each layer into its computed form as soon as it is complete."""

    def __init__(
        self, spec: DecoderSpec, mode: WeightMode, device: torch.device, *, pack_nf4: bool
    ) -> None:
        self._pack_nf4 = pack_nf4
        self._spec = spec
        self._mode = mode
        self._device = device
        self._waiting: dict[str, NamedWeight] = {}
        self._layers: list[LayerWeights] = []
        self._kinds: dict[str, int] = {}
        self._expected = len({name for stored in stored_tensors(spec) for name in stored.names})
        self._added = 0

    @property
    def share_done(self) -> float:
        """How much has been added, from 0 to 1."""
        return self._added / self._expected

    @property
    def quantization(self) -> str:
        """The kind of most layer matrices by their number of weights: q4_1, q8_0, bf16, …"""
        if self._mode.layers == "nf4":
            return "nf4" if self._pack_nf4 else "nf4-bf16"
        kind = max(self._kinds, key=self._kinds.__getitem__)
        return DTYPE_NAMES[self._mode.dtype] if kind == "dense" else kind

    def add(self, weight: NamedWeight) -> None:
        """Take the next weight; a layer is built when the first weight of the next one arrives."""
        current = f"layers.{len(self._layers)}."
        following = f"layers.{len(self._layers) + 1}."
        if weight.name.startswith(following):
            self._layers.append(self._layer(current))
        if _LAYER_MATRIX.fullmatch(weight.name):
            size = weight.shape[0] * weight.shape[1]
            self._kinds[weight.kind] = self._kinds.get(weight.kind, 0) + size
        self._waiting[weight.name] = self._in_rope_order(weight)
        self._added += 1

    def _in_rope_order(self, weight: NamedWeight) -> NamedWeight:
        rope = self._spec.rope
        if rope is None or not _ROTATED.fullmatch(weight.name):
            return weight
        return replace(
            weight, data=to_neighbours(weight.data, self._spec.head_dim, rope.rotary_dim)
        )

    def finish(self) -> DecoderWeights:
        """Build the last layer and everything around the layers."""
        self._layers.append(self._layer(f"layers.{len(self._layers)}."))
        positions = self._waiting.pop("positions", None)
        embed_weight = self._waiting["embed"]
        embed = self._table(embed_weight)
        return DecoderWeights(
            embed=embed,
            positions=None if positions is None else self._table(positions),
            embed_in=self._optional_linear("embed_in"),
            layers=tuple(self._layers),
            final_norm=self._norm("final_norm") if self._spec.final_norm else None,
            embed_out=self._optional_linear("embed_out"),
            head=self._head(embed),
        )

    def _head(self, embed: EmbeddingTable) -> Linear:
        if not self._spec.tied_embeddings:
            return self._linear("head")
        if embed.kind == "dense":
            return DenseLinear(embed.data)
        return self._linear("embed")

    def _layer(self, prefix: str) -> LayerWeights:
        mlp_in = ("gate", "up") if self._spec.gated_mlp else ("up",)
        return LayerWeights(
            attn_norm=self._norm(f"{prefix}attn_norm"),
            qkv=self._linear(*(prefix + name for name in ("q", "k", "v"))),
            attn_out=self._linear(f"{prefix}o"),
            mlp_norm=self._norm(f"{prefix}mlp_norm"),
            mlp_in=self._linear(*(prefix + name for name in mlp_in)),
            mlp_out=self._linear(f"{prefix}down"),
            qk_norm=self._qk_norm(prefix) if self._spec.qk_norm else None,
        )

    def _qk_norm(self, prefix: str) -> Norm:
        spec = self._spec
        q, k = (self._vector(f"{prefix}{name}") for name in ("q_norm", "k_norm"))
        heads = torch.cat((q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1)))
        return Norm(heads, None, spec.norm_eps)

    def _norm(self, name: str) -> Norm:
        bias = self._vector(f"{name}.bias") if self._spec.norm == "layer" else None
        return Norm(self._vector(name), bias, self._spec.norm_eps)

    def _vector(self, name: str) -> Tensor:
        dtype = residual_dtype(self._mode.dtype)
        return self._waiting.pop(name).data.to(self._device, dtype, copy=True)

    def _linear(self, *names: str) -> Linear:
        parts = [self._waiting.pop(name) for name in names]
        bias_names = [f"{name}.bias" for name in names if f"{name}.bias" in self._waiting]
        biases = [self._waiting.pop(name).data for name in bias_names]
        if self._pack_nf4 and all(packs_nf4(part) for part in parts):
            return make_nf4_linear(parts, biases, self._device)
        return make_linear(parts, biases, self._mode.dtype, self._device)

    def _optional_linear(self, name: str) -> Linear | None:
        return self._linear(name) if name in self._waiting else None

    def _table(self, weight: NamedWeight) -> EmbeddingTable:
        dtype = self._mode.dtype if weight.kind == "dense" else torch.uint8
        return EmbeddingTable(weight.kind, weight.data.to(self._device, dtype, copy=True))

"""Loads a model directory into the weights of a decoder, and into a `TorchDecoder`.

Owns the building of a decoder's linears, norms and tables from weights as weight_modes.py serves
them. Reads weight by weight and keeps at most one layer beside what is loaded already. Knows
nothing of requests. Runs once in the engine child's main thread, and in tools that load a model.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog
import torch
from heedful_kernels.launch import count_fallback
from torch import Tensor

from heedful_server.model.cuda_linear import are_alike, pack_int8, pack_nf4, take_packed
from heedful_server.model.decoder import (
    DecoderWeights,
    LayerWeights,
    TorchDecoder,
    residual_dtype,
)
from heedful_server.model.embedding import EmbeddingTable
from heedful_server.model.families import read_spec
from heedful_server.model.linear import DenseLinear, Linear, make_linear
from heedful_server.model.names import stored_tensors
from heedful_server.model.norm import Norm
from heedful_server.model.rope import to_neighbours
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weight_modes import (
    DTYPE_NAMES,
    WeightMode,
    is_layer_matrix,
    mode_of,
    resolve_device,
    served,
    stays_packed,
)
from heedful_server.model.weights import NamedWeight, iterate_weights

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]

_ROTATED: Final = re.compile(r"layers\.\d+\.(q|k)(_norm|\.bias)?")


def load_decoder(model_dir: Path, quantize: str, device: str, progress: Progress) -> TorchDecoder:
    """Load a model directory; progress gets ("weights", share done).

    Raises:
        BadCheckpoint: files or tensors are missing, truncated or of the wrong shape.
        UnsupportedModel: the architecture, or `quantize` on it, is not served.
    """
    spec = read_spec(model_dir)
    target = resolve_device(device)
    mode = mode_of(model_dir, quantize, target)
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
    gpu_kernels: bool = False,
    fixed_tiles: bool = False,
) -> tuple[DecoderWeights, str]:
    """The weights of a directory as a decoder computes with them, and what clients call their form.

    With gpu_kernels, matrices in bitsandbytes' forms stay packed where a kernel takes them so; with
    fixed_tiles every product is one whose rows do not depend on each other. Errors as
    `load_decoder`.
    """
    builder = _Builder(spec, mode, device, gpu_kernels=gpu_kernels, fixed_tiles=fixed_tiles)
    progress("weights", 0.0)
    for weight in iterate_weights(model_dir, spec):
        packed = gpu_kernels and stays_packed(weight, mode)
        builder.add(weight if packed else served(weight, mode))
        progress("weights", builder.share_done)
    return builder.finish(), builder.quantization


class _Builder:
    """Collects weights and turns each layer into its computed form as soon as it is complete."""

    def __init__(
        self,
        spec: DecoderSpec,
        mode: WeightMode,
        device: torch.device,
        *,
        gpu_kernels: bool,
        fixed_tiles: bool,
    ) -> None:
        self._gpu_kernels = gpu_kernels
        self._fixed_tiles = fixed_tiles
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
        form = self._mode.bnb_form
        if form is not None:
            return form if self._gpu_kernels else f"{form}-bf16"
        kind = max(self._kinds, key=self._kinds.__getitem__)
        return DTYPE_NAMES[self._mode.dtype] if kind == "dense" else kind

    def add(self, weight: NamedWeight) -> None:
        """Take the next weight; a layer is built when the first weight of the next one arrives."""
        current = f"layers.{len(self._layers)}."
        following = f"layers.{len(self._layers) + 1}."
        if weight.name.startswith(following):
            self._layers.append(self._layer(current))
        if is_layer_matrix(weight):
            size = weight.shape[0] * weight.shape[1]
            self._kinds[weight.kind] = self._kinds.get(weight.kind, 0) + size
        self._waiting[weight.name] = self._in_rope_order(weight)
        self._added += 1

    def _in_rope_order(self, weight: NamedWeight) -> NamedWeight:
        rope = self._spec.rope
        if rope is None or not _ROTATED.fullmatch(weight.name):
            return weight

        def reordered(rows: Tensor) -> Tensor:
            return to_neighbours(rows, self._spec.head_dim, rope.rotary_dim)

        scales = None if weight.scales is None else reordered(weight.scales)
        return replace(weight, data=reordered(weight.data), scales=scales)

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
            return DenseLinear(embed.data, fixed_tiles=self._fixed_tiles)
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
        fixed_tiles, device = self._fixed_tiles, self._device
        if are_alike(parts):
            return take_packed(parts, biases, device, fixed_tiles=fixed_tiles)
        is_packed_here = self._gpu_kernels and self._mode.layers in ("nf4", "int8")
        if is_packed_here and all(stays_packed(part, self._mode) for part in parts):
            pack = pack_nf4 if self._mode.layers == "nf4" else pack_int8
            return pack(parts, biases, device, fixed_tiles=fixed_tiles)
        if self._gpu_kernels and self._mode.bnb_form and is_layer_matrix(parts[0]):
            log.warning("expanded to bfloat16: blocks are no parts of rows", tensor=names[0])
            count_fallback(f"{self._mode.bnb_form}_matmul", "expanded")
        return make_linear(parts, biases, self._mode.dtype, device, fixed_tiles=fixed_tiles)

    def _optional_linear(self, name: str) -> Linear | None:
        return self._linear(name) if name in self._waiting else None

    def _table(self, weight: NamedWeight) -> EmbeddingTable:
        kind = weight.kind
        assert kind != "nf4", "tables are served dense or in blocks"
        assert kind != "int8", "tables are served dense or in blocks"
        dtype = self._mode.dtype if kind == "dense" else torch.uint8
        return EmbeddingTable(kind, weight.data.to(self._device, dtype, copy=True))

"""Packs a model's weights for the native CPU kernels.

Owns the fusing of linears (q|k|v, gate|up) and the choice of form for each weight: GGUF blocks are
repacked as they are, float weights are quantized to the asked form. Knows nothing of activations or
steps. Runs while loading, in the engine child's main thread.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from heedful_kernels.cpu import Arena, PackedWeight, RopeTable, pack_q4_1, pack_q8_0, packed_bytes
from torch import Tensor

from heedful_server.model.blocks import BlockKind, quantize_blocks
from heedful_server.model.native_decoder import NativeLayer, NativeWeights
from heedful_server.model.rope import rope_table
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight, iterate_weights

Progress = Callable[[str, float], None]

_LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_GROUP = 32
# The form of embedding and head: their rounding goes straight to the logits.
TABLE_KIND: Final[BlockKind] = "q8_0"


def is_native_spec(spec: DecoderSpec) -> bool:
    """Whether the native programs cover the spec's layers and sizes."""
    sizes = (spec.hidden_size, spec.q_size, spec.ffn_size)
    return (
        spec.architecture in _LLAMA_LIKE
        and spec.activation == "silu"
        and spec.gated_mlp
        and not spec.mlp_bias
        and spec.rope is not None
        and spec.head_dim in (32, 64, 80, 96, 128)
        and all(size % _GROUP == 0 for size in sizes)
    )


def pack_weights(
    model_dir: Path, spec: DecoderSpec, float_kind: BlockKind, progress: Progress
) -> NativeWeights:
    """Read and pack every weight; float linears become float_kind, the embedding and head Q8_0.

    Raises:
        ModelUnusable: the checkpoint is incomplete or damaged.
    """
    packer = _Packer(spec, float_kind)
    layer: dict[str, NamedWeight] = {}
    layers: list[NativeLayer] = []
    outer: dict[str, NamedWeight] = {}
    for weight in iterate_weights(model_dir, spec):
        prefix = f"layers.{len(layers)}."
        if not weight.name.startswith(prefix):
            outer[weight.name] = weight
            continue
        layer[weight.name.removeprefix(prefix)] = weight
        if len(layer) == _weights_per_layer(spec):
            layers.append(packer.layer(layer))
            layer = {}
            progress("weights", len(layers) / spec.num_layers)
    return packer.model(outer, layers)


class _Packer:
    """Packs into one arena on huge pages, in the order in which a step reads."""

    def __init__(self, spec: DecoderSpec, float_kind: BlockKind) -> None:
        self._spec = spec
        self._float_kind = float_kind
        self._num_bytes = 0
        # Room for the larger form everywhere: pages that are never touched cost nothing.
        self._arena = Arena(_most_bytes(spec))

    def layer(self, weights: Mapping[str, NamedWeight]) -> NativeLayer:
        spec = self._spec
        return NativeLayer(
            input_norm_H=_vector(weights["attn_norm"]),
            qkv=self._linear([weights[name] for name in ("q", "k", "v")]),
            qkv_bias=_bias([weights[f"{name}.bias"] for name in ("q", "k", "v")])
            if spec.qkv_bias
            else None,
            q_norm_D=_vector(weights["q_norm"]) if spec.qk_norm else None,
            k_norm_D=_vector(weights["k_norm"]) if spec.qk_norm else None,
            output=self._linear([weights["o"]]),
            output_bias=_bias([weights["o.bias"]]) if spec.attention_out_bias else None,
            mlp_norm_H=_vector(weights["mlp_norm"]),
            gate_up=self._linear([weights["gate"], weights["up"]]),
            down=self._linear([weights["down"]]),
        )

    def model(self, outer: Mapping[str, NamedWeight], layers: list[NativeLayer]) -> NativeWeights:
        spec = self._spec
        assert spec.rope is not None
        embedding = self._pack(TABLE_KIND, [outer["embed"]])
        head = embedding if spec.tied_embeddings else self._pack(TABLE_KIND, [outer["head"]])
        cos, sin = rope_table(spec.rope, spec.context_tokens)
        return NativeWeights(
            embedding=embedding,
            layers=layers,
            final_norm_H=_vector(outer["final_norm"]),
            head=head,
            rope=RopeTable(_aligned(cos), _aligned(sin)),
            num_bytes=self._num_bytes,
            lookup_bytes=0 if spec.tied_embeddings else embedding.num_bytes,
        )

    def _linear(self, parts: list[NamedWeight]) -> PackedWeight:
        return self._pack(fused_kind(parts, self._float_kind), parts)

    def _pack(self, kind: BlockKind, parts: list[NamedWeight]) -> PackedWeight:
        blocks = torch.cat([as_blocks(kind, part) for part in parts])
        n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
        pack = pack_q4_1 if kind == "q4_1" else pack_q8_0
        packed = pack(blocks.flatten(), n, k, arena=self._arena)
        self._num_bytes += packed.num_bytes
        return packed


def fused_kind(parts: Sequence[NamedWeight], float_kind: BlockKind) -> BlockKind:
    """The form of a linear made of several weights, float ones becoming float_kind."""
    kinds = {
        part.kind
        for part in parts
        if part.kind != "dense" and part.kind != "nf4" and part.kind != "int8"
    }
    # Parts of different forms are fused in the finer one, which loses next to nothing.
    return max(kinds, default=float_kind)


def as_blocks(kind: BlockKind, weight: NamedWeight) -> Tensor:
    """A weight's blocks in a form: as they are, or quantized to it."""
    return weight.data if weight.kind == kind else quantize_blocks(kind, weight.dequantize())


def _most_bytes(spec: DecoderSpec) -> int:
    hidden, q, kv, ffn = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_size
    layer = [(q + 2 * kv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn)]
    shapes = layer * spec.num_layers + [(spec.vocab_size, hidden)] * 2
    # Every piece starts on a cache line.
    return sum(packed_bytes("q8", n, k) + 64 for n, k in shapes)


def _weights_per_layer(spec: DecoderSpec) -> int:
    return 9 + 3 * spec.qkv_bias + 2 * spec.qk_norm + spec.attention_out_bias


def _vector(weight: NamedWeight) -> Tensor:
    return _aligned(weight.data.float())


def _bias(parts: list[NamedWeight]) -> Tensor:
    return _aligned(torch.cat([part.data.float() for part in parts]))


def _aligned(tensor: Tensor) -> Tensor:
    # A fresh allocation is 64-byte aligned; a view of a mapped file need not be.
    return tensor.clone(memory_format=torch.contiguous_format)

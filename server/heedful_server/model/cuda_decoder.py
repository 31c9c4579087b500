"""The decoder on the Triton kernels: a step's rows in a dozen launches a layer, for every family.

Owns `CudaDecoder` and the order of the operations; the kernels own their formulas, `cuda_graphs.py`
the replaying of small steps. Computes what `TorchDecoder` computes, from the same weights and the
same cache layout: the residual stream is fp32, each sum is added to it and normalised in one
launch, rotation and cache write are one, attention reads the cache through the block tables, and
every adapter of a batch is added in one pair of launches a linear, and tokens are drawn where the
logits are. Nothing waits for the device.

Deterministic means that a row's bits do not depend on what else is in the step: attention in parts
of a fixed size and one tile, the draw's walk and the adapters cut up alike for every step, and
linears that were loaded with fixed tiles. Norms, rotations and activations are row by row anyway.
Knows nothing of files or requests. Runs in the engine child's main thread, but for load_adapter.

On a CPU the operations run their torch references (or Triton's interpreter): that is how the tests
compare it with `TorchDecoder`, and no way to serve.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from heedful_kernels.launch import HAS_TRITON, fallback_counts
from heedful_kernels.layernorm import add_layernorm_, layernorm
from heedful_kernels.lora import LoraPlan, LoraWeights, add_lora_, plan_lora
from heedful_kernels.paged_attention import paged_attention
from heedful_kernels.rmsnorm import add_rmsnorm_, rmsnorm
from heedful_kernels.rope_cache import rope_cache
from heedful_kernels.swiglu import GateActivation, gated
from torch import Tensor

from heedful_server.model import kv_cache as kv
from heedful_server.model.adapter import AdapterWeights
from heedful_server.model.batch import ForwardBatch, ForwardResult
from heedful_server.model.cuda_adapters import AdapterSlots, LayerSlots
from heedful_server.model.cuda_draws import draw, draw_settled
from heedful_server.model.cuda_graphs import GraphedSteps
from heedful_server.model.cuda_step import CudaStep, make_step
from heedful_server.model.decoder import (
    DecoderWeights,
    LayerWeights,
    lookup_bytes,
    weight_bytes,
)
from heedful_server.model.kv_cache import KVCache
from heedful_server.model.norm import Norm
from heedful_server.model.rope import inverse_frequencies
from heedful_server.model.spec import Activation, DecoderSpec

_MAX_HEAD_DIM: Final = 256
_MIN_CAPABILITY: Final = (8, 0)
# Positions of a part of attention in deterministic mode.
_FIXED_SPLIT_TOKENS: Final = 512


def why_not_cuda_kernels(spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model on a CUDA device is served by torch operators; None when kernels serve it."""
    if not HAS_TRITON:
        return "no_triton"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "dtype"
    if spec.head_dim > _MAX_HEAD_DIM:
        return "head_size"
    capable = torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    return None if capable else "compute_capability"


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer at work: its weights, its cache, its adapters' room."""

    weights: LayerWeights
    cache: Tensor
    slots: LayerSlots | None


@dataclass(frozen=True, slots=True)
class _Shared:
    """What a step's layers share."""

    step: CudaStep
    cos_TP: Tensor
    sin_TP: Tensor
    plan: LoraPlan | None


class CudaDecoder:
    """A spec's weights on the Triton kernels."""

    draws_tokens = True
    kernel_path = "triton"

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str,
        deterministic: bool = False,
        graphs: bool = True,
    ) -> None:
        self.spec = spec
        self.quantization = quantization
        self.device = device
        self.dtype = dtype
        self.weight_bytes = weight_bytes(weights)
        self.step_weight_bytes = self.weight_bytes - lookup_bytes(weights)
        self._weights = weights
        self._deterministic = deterministic
        self._frequencies = (
            inverse_frequencies(spec.rope).to(device) if spec.rope is not None else None
        )
        self._adapters: AdapterSlots | None = None
        self._own_fallbacks: dict[str, int] = {}
        # Held by whoever captures a step or loads an adapter: the two would disturb each other.
        self._device_lock = threading.Lock()
        graphed = graphs and device.type == "cuda"
        self._graphs = GraphedSteps(self._compute, self._device_lock) if graphed else None

    @property
    def fallbacks(self) -> dict[str, int]:
        """How often something did not run on its kernel, by operation and reason."""
        return self._own_fallbacks | fallback_counts()

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of the cache takes over all layers."""
        return kv.kv_bytes_per_block(self.spec, block_size, self.dtype)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache of zeros in the compute dtype; graphs of an earlier cache are dropped."""
        if self._graphs is not None:
            self._graphs.clear()
        return kv.allocate_kv_cache(self.spec, num_blocks, block_size, self.dtype, self.device)

    def copy_blocks(self, kv_cache: KVCache, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        kv.copy_blocks(kv_cache, pairs)

    def reserve_adapters(self, num_slots: int, max_rank: int) -> None:
        """Take the memory of all slots."""
        if num_slots:
            self._adapters = AdapterSlots(self.spec, num_slots, max_rank, self.dtype, self.device)

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot that no sequence has, from any thread; return its bytes."""
        assert self._adapters is not None, "reserve_adapters comes first"
        with self._device_lock:
            return self._adapters.load(slot, weights)

    def drop_adapter(self, slot: int) -> None:
        """Empty a slot that no sequence has."""
        assert self._adapters is not None, "reserve_adapters comes first"
        self._adapters.clear(slot)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> ForwardResult:
        """Write the batch's keys and values; logits [R, vocab] in fp32."""
        if self._graphs is not None and self._graphs.takes(batch):
            result = self._graphs.run(batch, kv_cache, self.spec.context_tokens)
        else:
            result = self._compute(make_step(batch, self.device), kv_cache)
        if batch.draws is None or result.drawn_6D is not None:
            return result
        drawn_6D = draw(result.logits_RV, batch.draws, fixed_splits=self._deterministic)
        return replace(result, drawn_6D=drawn_6D)

    def _compute(self, step: CudaStep, kv_cache: KVCache) -> ForwardResult:
        weights, adapters = self._weights, self._adapters
        use_adapters = adapters is not None and step.adapter_slots_T is not None
        shared = self._shared(step)
        x_TH = self._embed(step)
        update: Tensor | None = None
        for idx, layer in enumerate(weights.layers):
            slots = adapters.layers[idx] if adapters is not None and use_adapters else None
            part = _Layer(layer, kv_cache.data[idx], slots)
            if self.spec.residual == "post":
                x_TH = self._post_layer(x_TH, part, shared)
            else:
                update = self._layer(x_TH, update, part, shared)
        if update is not None:
            x_TH.add_(update)
        wanted_RH = self._final(x_TH.index_select(0, step.logit_rows_R), self.dtype)
        hidden_QH = self._final(x_TH.index_select(0, step.hidden_rows_Q), torch.float32)
        logits_RV = self._logits(wanted_RH)
        drawn_6R = None
        if step.settings is not None:
            drawn_6R = draw_settled(logits_RV, step.settings, fixed_splits=self._deterministic)
        return ForwardResult(logits_RV, None, hidden_QH, drawn_6R)

    def _shared(self, step: CudaStep) -> _Shared:
        if self._frequencies is None:
            cos_TP = sin_TP = torch.empty(len(step.positions_T), 0, device=self.device)
        else:
            angles_TP = step.positions_T[:, None].float() * self._frequencies
            cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
        plan = None
        if step.adapter_slots_T is not None and self._adapters is not None:
            plan = plan_lora(step.adapter_slots_T, self._adapters.num_slots)
        return _Shared(step, cos_TP, sin_TP, plan)

    def _embed(self, step: CudaStep) -> Tensor:
        weights = self._weights
        x = weights.embed.rows(step.token_ids_T, torch.float32)
        if weights.embed_in is not None:
            x = weights.embed_in(x.to(self.dtype)).float()
        if weights.positions is not None:
            rows = step.positions_T + self.spec.position_offset
            x = x + weights.positions.rows(rows, torch.float32)
        return x

    def _layer(self, x_TH: Tensor, update: Tensor | None, layer: _Layer, shared: _Shared) -> Tensor:
        """What the layer adds to the stream; x gets what the layer before it added."""
        weights = layer.weights
        normed_TH = _normed(weights.attn_norm, x_TH, update, self.dtype)
        attention_TH = self._attention(normed_TH, layer, shared)
        if self.spec.residual == "parallel":
            mlp_TH = self._mlp(_normed(weights.mlp_norm, x_TH, None, self.dtype), layer, shared)
            return (
                attention_TH.add_(mlp_TH)
                if self.dtype == torch.float32
                else (attention_TH.float().add_(mlp_TH))
            )
        return self._mlp(_normed(weights.mlp_norm, x_TH, attention_TH, self.dtype), layer, shared)

    def _post_layer(self, x_TH: Tensor, layer: _Layer, shared: _Shared) -> Tensor:
        weights = layer.weights
        attention_TH = self._attention(x_TH.to(self.dtype), layer, shared)
        x_TH = _normed(weights.attn_norm, x_TH, attention_TH, torch.float32)
        mlp_TH = self._mlp(x_TH.to(self.dtype), layer, shared)
        return _normed(weights.mlp_norm, x_TH, mlp_TH, torch.float32)

    def _attention(self, x_TH: Tensor, layer: _Layer, shared: _Shared) -> Tensor:
        spec, step, weights, slots = self.spec, shared.step, layer.weights, layer.slots
        qkv_TQ = weights.qkv(x_TH)
        self._adapt_(qkv_TQ, x_TH, None if slots is None else slots.qkv, shared)
        q_THD = rope_cache(
            qkv_TQ,
            shared.cos_TP,
            shared.sin_TP,
            step.slots_T,
            layer.cache,
            num_heads=spec.num_heads,
            # The loader puts partners side by side (see rope.py).
            neighbours=True,
            norm_weight_ND=None if weights.qk_norm is None else weights.qk_norm.weight,
            eps=spec.norm_eps,
        )
        attended_THD = paged_attention(
            q_THD,
            layer.cache,
            step.block_tables_SN,
            step.query_starts_S1,
            step.context_lens_S,
            scale=spec.attention_scale,
            max_query_tokens=step.max_query_tokens,
            max_context_tokens=step.max_context_tokens,
            split_tokens=_FIXED_SPLIT_TOKENS if self._deterministic else 0,
        )
        attended_TQ = attended_THD.flatten(1)
        out_TH = weights.attn_out(attended_TQ)
        self._adapt_(out_TH, attended_TQ, None if slots is None else slots.attn_out, shared)
        return out_TH

    def _mlp(self, x_TH: Tensor, layer: _Layer, shared: _Shared) -> Tensor:
        weights, slots = layer.weights, layer.slots
        up_TF = weights.mlp_in(x_TH)
        self._adapt_(up_TF, x_TH, None if slots is None else slots.mlp_in, shared)
        active_TF = self._activated(up_TF)
        out_TH = weights.mlp_out(active_TF)
        self._adapt_(out_TH, active_TF, None if slots is None else slots.mlp_out, shared)
        return out_TH

    def _adapt_(self, y: Tensor, x: Tensor, room: LoraWeights | None, shared: _Shared) -> None:
        """Add each row's adapter to a linear's output in place; nothing without a plan."""
        if room is not None and shared.plan is not None:
            add_lora_(y, x, room, shared.plan, fixed_tiles=self._deterministic)

    def _activated(self, up_TF: Tensor) -> Tensor:
        activation = self.spec.activation
        if not self.spec.gated_mlp:
            return _ACTIVATIONS[activation](up_TF)
        if activation == "relu":
            gate_TF, up_TF = up_TF.chunk(2, dim=1)
            return F.relu(gate_TF) * up_TF
        return gated(up_TF, _GATES[activation])

    def _final(self, x_RH: Tensor, dtype: torch.dtype) -> Tensor:
        weights = self._weights
        if len(x_RH) == 0:
            return x_RH.new_empty((0, self.spec.embed_size))
        if weights.final_norm is not None:
            x_RH = _normed(weights.final_norm, x_RH, None, dtype)
        if weights.embed_out is not None:
            x_RH = weights.embed_out(x_RH.to(self.dtype))
        return x_RH.to(dtype)

    def _logits(self, x_RE: Tensor) -> Tensor:
        if len(x_RE) == 0:
            return x_RE.new_empty((0, self.spec.vocab_size))
        return self._weights.head(x_RE).float()


def _normed(norm: Norm, x_TH: Tensor, update: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The norm of x after the update is added to x in place, rounded to dtype."""
    if norm.bias is None:
        if update is None:
            return rmsnorm(x_TH, norm.weight, norm.eps, out_dtype=dtype)
        return add_rmsnorm_(update, x_TH, norm.weight, norm.eps, out_dtype=dtype)
    if update is None:
        return layernorm(x_TH, norm.weight, norm.bias, norm.eps, out_dtype=dtype)
    return add_layernorm_(update, x_TH, norm.weight, norm.bias, norm.eps, out_dtype=dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_GATES: Final[dict[Activation, GateActivation]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
}
_ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}

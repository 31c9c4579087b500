"""The decoder on torch operators: one forward pass over a flat batch, for every family.

Owns `Decoder`, what the engine expects of any decoder, and `TorchDecoder`, which executes a spec.
The residual stream is fp32 (fp64 in fp64 mode) while linear layers and attention run in the compute
dtype. Knows nothing of files, quantization formats or requests. Runs in the engine child's main
thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_server.model import kv_cache as kv
from heedful_server.model.adapter import AdapterWeights
from heedful_server.model.attention import AttentionPlan, attend, plan_attention
from heedful_server.model.batch import ForwardBatch, ForwardResult
from heedful_server.model.embedding import EmbeddingTable
from heedful_server.model.kv_cache import KVCache
from heedful_server.model.linear import Linear
from heedful_server.model.lora import (
    AdapterRows,
    LayerUpdates,
    TorchAdapter,
    Update,
    add_update,
    group_rows,
    make_adapter,
)
from heedful_server.model.norm import Norm
from heedful_server.model.rope import inverse_frequencies, rotate_, rotations
from heedful_server.model.spec import Activation, DecoderSpec


class Decoder(Protocol):
    """What the engine needs of a model, whichever kernels compute it.

    The cache is the decoder's own affair: callers keep it and hand it back. `fallbacks` counts, by
    reason, what did not run on the fastest path. One that `draws_tokens` also samples, as its
    batch's `draws` say; of any other they must not be asked. `step_weight_bytes` are those that
    every step reads: all but an embedding that is only looked up.
    """

    draws_tokens: bool
    spec: DecoderSpec
    quantization: str
    kernel_path: str
    weight_bytes: int
    step_weight_bytes: int
    device: torch.device

    @property
    def fallbacks(self) -> dict[str, int]:
        """How often something did not run on the fastest path, by reason."""

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of the cache takes over all layers."""

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> Any:
        """A cache for all layers."""

    def copy_blocks(self, kv_cache: Any, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer; no source is also written."""

    def reserve_adapters(self, num_slots: int, max_rank: int) -> None:
        """Make room for adapters; once, and before the cache is allocated."""

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot that no sequence has; return its bytes.

        May be called from another thread while a forward pass runs.
        """

    def drop_adapter(self, slot: int) -> None:
        """Empty a slot that no sequence has."""

    def forward(self, batch: ForwardBatch, kv_cache: Any) -> ForwardResult:
        """Write the batch's keys and values; return logits [R, vocab] of its logit rows.

        Each row gets the update of its sequence's adapter. The result may be overwritten by the
        next call.
        """


# The updates of one layer with the rows that get them; None means all rows.
_RowUpdates = list[tuple[Tensor | None, LayerUpdates]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer; qk_norm stacks the norms of all query and key heads.

    Rows of query and key weights, biases and norms are in the order that `rope.rotate_` wants.
    """

    attn_norm: Norm
    qkv: Linear
    attn_out: Linear
    mlp_norm: Norm
    mlp_in: Linear
    mlp_out: Linear
    qk_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """What a forward pass prepares once for all its layers."""

    slots_T: Tensor
    attention: AttentionPlan
    turns: Tensor | None
    adapters: tuple[AdapterRows, ...]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights, in the forms in which they are computed with."""

    embed: EmbeddingTable
    positions: EmbeddingTable | None
    embed_in: Linear | None
    layers: tuple[LayerWeights, ...]
    final_norm: Norm | None
    embed_out: Linear | None
    head: Linear


class TorchDecoder:
    """A decoder on torch operators, for CPUs and GPUs.

    With `exact_attention` and packed weights a row's logits depend on the tokens of its own
    sequence alone, bit for bit: not on the batch, and not on how the prompt was cut (see
    `attention.py`).
    """

    draws_tokens = False
    kernel_path = "torch"

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str,
        exact_attention: bool = False,
    ) -> None:
        self.spec = spec
        self.quantization = quantization
        self.device = device
        self.dtype = dtype
        self.residual_dtype = residual_dtype(dtype)
        self.fallbacks: dict[str, int] = {}
        self.weight_bytes = weight_bytes(weights)
        self.step_weight_bytes = self.weight_bytes - lookup_bytes(weights)
        self._weights = weights
        self._exact_attention = exact_attention
        self._frequencies = (
            inverse_frequencies(spec.rope).to(device) if spec.rope is not None else None
        )
        self._activation = _ACTIVATIONS[spec.activation]
        self._adapters: list[TorchAdapter | None] = []

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of the cache takes over all layers."""
        return kv.kv_bytes_per_block(self.spec, block_size, self.dtype)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache of zeros in the compute dtype."""
        return kv.allocate_kv_cache(self.spec, num_blocks, block_size, self.dtype, self.device)

    def copy_blocks(self, kv_cache: KVCache, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        kv.copy_blocks(kv_cache, pairs)

    def reserve_adapters(self, num_slots: int, max_rank: int) -> None:
        """Make room for adapters; their memory is taken when they are loaded."""
        self._adapters = [None] * num_slots

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot that no sequence has, from any thread; return its bytes."""
        adapter = make_adapter(weights, self.spec, self.residual_dtype, self.device)
        self._adapters[slot] = adapter
        return adapter.num_bytes

    def drop_adapter(self, slot: int) -> None:
        """Empty a slot that no sequence has."""
        self._adapters[slot] = None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> ForwardResult:
        """Write the batch's keys and values; logits [R, vocab] in fp32 (fp64 in fp64 mode)."""
        batch = batch.to(self.device)
        exact = self._exact_attention
        turns = (
            rotations(self._frequencies, batch.positions_T, self.residual_dtype)
            if self._frequencies is not None
            else None
        )
        step = _Step(
            slots_T=batch.slot_mapping_T,
            attention=plan_attention(batch, kv_cache.block_size, self.dtype, exact=exact),
            turns=turns,
            adapters=group_rows(batch, self._adapters),
        )
        x_TH = self._embed(batch)
        for idx, layer in enumerate(self._weights.layers):
            cache = (kv_cache.slots[idx], kv_cache.blocks[idx])
            x_TH = self._layer(x_TH, idx, layer, cache, step)
        wanted_RH = self._final(x_TH.index_select(0, batch.logit_rows_R), self.dtype)
        hidden_QH = self._final(x_TH[list(batch.hidden_rows)], self.residual_dtype)
        return ForwardResult(self._logits(wanted_RH), None, hidden_QH)

    def _embed(self, batch: ForwardBatch) -> Tensor:
        weights = self._weights
        x = weights.embed.rows(batch.token_ids_T, self.residual_dtype)
        if weights.embed_in is not None:
            x = weights.embed_in(x.to(self.dtype)).to(self.residual_dtype)
        if weights.positions is not None:
            rows = batch.positions_T + self.spec.position_offset
            x = x + weights.positions.rows(rows, self.residual_dtype)
        return x

    def _layer(
        self,
        x_TH: Tensor,
        idx: int,
        layer: LayerWeights,
        cache: tuple[Tensor, Tensor],
        step: _Step,
    ) -> Tensor:
        updates = [(group.rows_G, group.adapter.layers[idx]) for group in step.adapters]

        def attention(x: Tensor) -> Tensor:
            return self._attention(x, layer, cache, step, updates)

        residual = self.spec.residual
        if residual == "post":
            x_TH = layer.attn_norm(x_TH + attention(x_TH.to(self.dtype)), self.residual_dtype)
            mlp_TH = self._mlp(x_TH.to(self.dtype), layer, updates)
            return layer.mlp_norm(x_TH + mlp_TH, self.residual_dtype)
        attention_TH = attention(layer.attn_norm(x_TH, self.dtype))
        if residual == "parallel":
            mlp_TH = self._mlp(layer.mlp_norm(x_TH, self.dtype), layer, updates)
            return x_TH.add_(attention_TH).add_(mlp_TH)
        x_TH.add_(attention_TH)
        return x_TH.add_(self._mlp(layer.mlp_norm(x_TH, self.dtype), layer, updates))

    def _attention(
        self,
        x_TH: Tensor,
        layer: LayerWeights,
        cache: tuple[Tensor, Tensor],
        step: _Step,
        updates: _RowUpdates,
    ) -> Tensor:
        spec = self.spec
        qkv_TQ = layer.qkv(x_TH)
        for rows_G, update in updates:
            self._add(qkv_TQ, x_TH, update.qkv, rows_G)
        qk_THD = qkv_TQ[:, : spec.q_size + spec.kv_size].view(x_TH.shape[0], -1, spec.head_dim)
        if layer.qk_norm is not None:
            qk_THD.copy_(layer.qk_norm(qk_THD.to(self.residual_dtype), self.dtype))
        if step.turns is not None:
            rotate_(qk_THD, step.turns)
        slots, blocks = cache
        slots.index_copy_(0, step.slots_T, qkv_TQ[:, spec.q_size :])
        attended_TQ = attend(qkv_TQ[:, : spec.q_size], blocks, step.attention, spec)
        out_TH = layer.attn_out(attended_TQ)
        for rows_G, update in updates:
            self._add(out_TH, attended_TQ, update.attn_out, rows_G)
        return out_TH

    def _mlp(self, x_TH: Tensor, layer: LayerWeights, updates: _RowUpdates) -> Tensor:
        up_TF = layer.mlp_in(x_TH)
        for rows_G, update in updates:
            self._add(up_TF, x_TH, update.mlp_in, rows_G)
        if self.spec.gated_mlp:
            gate_TF, up_TF = up_TF.chunk(2, dim=1)
            active_TF = self._activation(gate_TF).mul_(up_TF)
        else:
            active_TF = self._activation(up_TF)
        out_TH = layer.mlp_out(active_TF)
        for rows_G, update in updates:
            self._add(out_TH, active_TF, update.mlp_out, rows_G)
        return out_TH

    def _add(self, y_TN: Tensor, x_TK: Tensor, update: Update, rows_G: Tensor | None) -> None:
        add_update(y_TN, x_TK, update, rows_G, exact=self._exact_attention)

    def _final(self, x_RH: Tensor, dtype: torch.dtype) -> Tensor:
        """What the head reads of rows of the residual stream."""
        weights = self._weights
        if x_RH.shape[0] == 0:
            # Kernels need not take empty inputs, and a chunk in mid-prompt wants no logits.
            return x_RH.new_empty((0, self.spec.embed_size))
        if weights.final_norm is not None:
            x_RH = weights.final_norm(x_RH, dtype)
        if weights.embed_out is not None:
            x_RH = weights.embed_out(x_RH.to(self.dtype))
        return x_RH.to(dtype)

    def _logits(self, x_RE: Tensor) -> Tensor:
        if x_RE.shape[0] == 0:
            return x_RE.new_empty((0, self.spec.vocab_size))
        return self._weights.head(x_RE).to(self.residual_dtype)


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over layers are kept in: fp32, or fp64 where everything is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


def weight_bytes(weights: DecoderWeights) -> int:
    """Bytes of all weights, a tied head counted once."""
    linears = [weights.head, weights.embed_in, weights.embed_out]
    norms = [weights.final_norm]
    for layer in weights.layers:
        linears += [layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out]
        norms += [layer.attn_norm, layer.mlp_norm, layer.qk_norm]
    parts = [*linears, *norms, weights.embed, weights.positions]
    total = sum(part.num_bytes for part in parts if part is not None)
    return total - weights.embed.bytes_shared_with(weights.head)


def lookup_bytes(weights: DecoderWeights) -> int:
    """Bytes of which a step reads a few rows: tables that are no head as well."""
    positions = 0 if weights.positions is None else weights.positions.num_bytes
    embed = weights.embed
    return embed.num_bytes - embed.bytes_shared_with(weights.head) + positions

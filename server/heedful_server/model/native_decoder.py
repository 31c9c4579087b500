"""A Llama-like decoder on the native CPU kernels: one step is two C calls, layers and head.

Owns the packed weights, the activation buffers and the programs that are bound to them: one for
steps without adapters, which pay nothing for the others, and one for steps with them. Knows nothing
of sequences or requests. A row's logits depend on that row's tokens and adapter alone, bit for bit,
whatever else is in the batch. Used by the engine child's main thread only, but for loading
adapters: buffers are reused by every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from heedful_kernels.cpu import (
    Batch,
    KVCache,
    NativeLibrary,
    PackedWeight,
    Program,
    ProgramBuilder,
    QuantizedRows,
    RopeTable,
    ThreadPool,
)
from torch import Tensor

from heedful_server.model.adapter import AdapterWeights
from heedful_server.model.batch import ForwardBatch, ForwardResult, RowStats
from heedful_server.model.native_adapters import NativeAdapters
from heedful_server.model.spec import DecoderSpec

# Rows of logits computed at a time: more would only grow the logits buffer.
_HEAD_ROWS = 64


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's weights as the kernels read them."""

    input_norm_H: Tensor
    qkv: PackedWeight
    qkv_bias: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    output: PackedWeight
    output_bias: Tensor | None
    mlp_norm_H: Tensor
    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True, slots=True)
class NativeWeights:
    """All weights of a Llama-like model."""

    embedding: PackedWeight | Tensor
    layers: list[NativeLayer]
    final_norm_H: Tensor
    head: PackedWeight
    rope: RopeTable
    num_bytes: int
    lookup_bytes: int = 0  # of an embedding that is no head as well

    @property
    def kind(self) -> str:
        """Form of the linears, as clients see it."""
        return {"q4": "q4_1", "q8": "q8_0"}[self.layers[0].gate_up.kind]


class NativeDecoder:
    """Packed weights with the buffers and programs of a step of up to max_rows tokens."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: NativeWeights,
        library: NativeLibrary,
        *,
        quantization: str,
        num_threads: int,
        max_rows: int,
    ) -> None:
        self.spec = spec
        self.quantization = quantization
        self.draws_tokens = False
        self.kernel_path = f"native-{library.isa}"
        self.weight_bytes = weights.num_bytes
        self.step_weight_bytes = weights.num_bytes - weights.lookup_bytes
        self.device = torch.device("cpu")
        self.fallbacks: dict[str, int] = {}
        self._weights = weights
        self._library = library
        self._pool = ThreadPool(library, num_threads)
        self._max_rows = max_rows
        self._buffers = _Buffers.empty(spec, max_rows)
        self._adapters: NativeAdapters | None = None
        self._programs: _Programs | None = None

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block over all layers."""
        padded = -(-self.spec.head_dim // 32) * 32
        per_position = self.spec.num_kv_heads * (self.spec.head_dim + padded) * 2
        return self.spec.num_layers * block_size * per_position

    def reserve_adapters(self, num_slots: int, max_rank: int) -> None:
        """Make room for adapters; memory is taken as slots are filled."""
        if num_slots > 0:
            self._adapters = NativeAdapters(self.spec, num_slots, max_rank, self._max_rows)

    def load_adapter(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot that no sequence has, from any thread; return its bytes."""
        assert self._adapters is not None, "reserve_adapters comes first"
        return self._adapters.load(slot, weights)

    def drop_adapter(self, slot: int) -> None:
        """Empty a slot that no sequence has."""
        assert self._adapters is not None, "reserve_adapters comes first"
        self._adapters.drop(slot)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """Allocate the paged cache and bind the programs to it."""
        spec = self.spec
        caches = [
            KVCache.empty(num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
            for _ in range(spec.num_layers)
        ]
        adapters = self._adapters
        self._programs = _Programs(
            plain=self._layers_program(caches, None),
            adapted=None if adapters is None else self._layers_program(caches, adapters),
            head=self._head_program(),
        )
        return caches

    def copy_blocks(self, kv_cache: list[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), in order, in every layer."""
        for cache in kv_cache:
            for source, destination in pairs:
                cache.keys[destination] = cache.keys[source]
                cache.values[destination] = cache.values[source]

    def forward(self, batch: ForwardBatch, kv_cache: list[KVCache]) -> ForwardResult:
        """Return logits_RV (fp32) of the wanted rows, their statistics, and final hidden states."""
        assert self._programs is not None, "allocate_kv_cache comes first"
        head = self._programs.head
        selected = batch.logit_rows_R.to(torch.int32)
        rows = _native_batch(batch, selected[:0])
        layers = self._programs.plain if rows.lora_slot is None else self._programs.adapted
        assert layers is not None, "the batch has adapters, and there are no slots"
        layers.run(self._pool, rows)
        hidden_QH = self._final_hidden(batch.hidden_rows)
        if selected.numel() <= _HEAD_ROWS:
            return ForwardResult(*self._run_head(head, rows, selected), hidden_QH)
        parts = torch.split(selected, _HEAD_ROWS)
        runs = [
            (logits_RV.clone(), stats)
            for logits_RV, stats in (
                self._run_head(head, rows, part.contiguous()) for part in parts
            )
        ]
        logits_RV = torch.cat([logits_RV for logits_RV, _ in runs])
        return ForwardResult(logits_RV, _joined([run[1] for run in runs]), hidden_QH)

    def _final_hidden(self, rows: tuple[int, ...]) -> Tensor:
        """Final-normed hidden states, row by row, so that company cannot change their bits."""
        if not rows:
            return self._buffers.hidden_TH[:0]
        size, weight_H = (self.spec.hidden_size,), self._weights.final_norm_H
        hidden_TH, eps = self._buffers.hidden_TH, self.spec.norm_eps
        return torch.stack([F.rms_norm(hidden_TH[row], size, weight_H, eps) for row in rows])

    def _run_head(self, head: Program, rows: Batch, selected: Tensor) -> tuple[Tensor, RowStats]:
        buffers, num_rows = self._buffers, selected.numel()
        if num_rows > 0:
            head.run(self._pool, _with_selected(rows, selected))
        stats = RowStats(
            buffers.argmax_R[:num_rows].clone(),
            buffers.max_R[:num_rows].clone(),
            buffers.lse_R[:num_rows].clone(),
        )
        return buffers.logits_RV[:num_rows], stats

    def _layers_program(self, caches: list[KVCache], adapters: NativeAdapters | None) -> Program:
        builder = ProgramBuilder(self._library, max_rows=self._max_rows, max_selected=_HEAD_ROWS)
        builder.embed(self._weights.embedding, self._buffers.hidden_TH)
        for idx, layer in enumerate(self._weights.layers):
            self._add_attention(builder, layer, caches[idx], adapters, idx)
            self._add_mlp(builder, layer, adapters, idx)
        return builder.build()

    def _add_attention(
        self,
        builder: ProgramBuilder,
        layer: NativeLayer,
        cache: KVCache,
        adapters: NativeAdapters | None,
        idx: int,
    ) -> None:
        spec, buffers = self.spec, self._buffers
        self._add_input_norm(builder, layer.input_norm_H, adapters)
        if adapters is not None:
            adapters.shrink(builder, adapters.input_TH, adapters.layers[idx].qkv)
        builder.linear(buffers.input_TH, layer.qkv, buffers.qkv, bias_N=layer.qkv_bias)
        if adapters is not None:
            adapters.expand(builder, adapters.layers[idx].qkv, buffers.qkv)
        builder.rope_kv(
            buffers.qkv,
            cache,
            q_heads=spec.num_heads,
            rope=self._weights.rope,
            q_norm_D=layer.q_norm_D,
            k_norm_D=layer.k_norm_D,
            eps=spec.norm_eps,
        )
        builder.attention(
            buffers.qkv,
            cache,
            buffers.attended,
            q_heads=spec.num_heads,
            max_positions=spec.context_tokens,
            scale=spec.attention_scale,
        )
        builder.quantize(buffers.attended, buffers.attended_q)
        if adapters is not None:
            adapters.shrink(builder, buffers.attended, adapters.layers[idx].output)
        builder.linear(
            buffers.attended_q,
            layer.output,
            buffers.hidden_TH,
            bias_N=layer.output_bias,
            accumulate=True,
        )
        if adapters is not None:
            adapters.expand(builder, adapters.layers[idx].output, buffers.hidden_TH)

    def _add_mlp(
        self,
        builder: ProgramBuilder,
        layer: NativeLayer,
        adapters: NativeAdapters | None,
        idx: int,
    ) -> None:
        buffers = self._buffers
        self._add_input_norm(builder, layer.mlp_norm_H, adapters)
        if adapters is not None:
            adapters.shrink(builder, adapters.input_TH, adapters.layers[idx].gate_up)
        builder.linear(buffers.input_TH, layer.gate_up, buffers.gate_up)
        if adapters is not None:
            adapters.expand(builder, adapters.layers[idx].gate_up, buffers.gate_up)
        builder.activation(
            buffers.gate_up,
            out=buffers.activated_TF,
            out_fp32_TF=None if adapters is None else adapters.activated_TF,
        )
        if adapters is not None:
            adapters.shrink(builder, adapters.activated_TF, adapters.layers[idx].down)
        builder.linear(buffers.activated_TF, layer.down, buffers.hidden_TH, accumulate=True)
        if adapters is not None:
            adapters.expand(builder, adapters.layers[idx].down, buffers.hidden_TH)

    def _add_input_norm(
        self, builder: ProgramBuilder, weight_H: Tensor, adapters: NativeAdapters | None
    ) -> None:
        buffers = self._buffers
        builder.norm(
            buffers.hidden_TH,
            weight_H,
            self.spec.norm_eps,
            out=buffers.input_TH,
            out_fp32_TH=None if adapters is None else adapters.input_TH,
        )

    def _head_program(self) -> Program:
        spec, weights, buffers = self.spec, self._weights, self._buffers
        builder = ProgramBuilder(self._library, max_rows=self._max_rows, max_selected=_HEAD_ROWS)
        builder.gather_rows(buffers.hidden_TH, buffers.selected_RH)
        builder.norm(
            buffers.selected_RH,
            weights.final_norm_H,
            spec.norm_eps,
            out=buffers.selected_q,
            selected=True,
        )
        builder.linear(buffers.selected_q, weights.head, buffers.logits_RV, selected=True)
        builder.argmax_lse(buffers.logits_RV, buffers.argmax_R, buffers.max_R, buffers.lse_R)
        return builder.build()


@dataclass(frozen=True, slots=True)
class _Programs:
    """The layers without and with adapters, and the head."""

    plain: Program
    adapted: Program | None
    head: Program


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Activations of one step."""

    hidden_TH: Tensor
    input_TH: QuantizedRows
    qkv: Tensor
    attended: Tensor
    attended_q: QuantizedRows
    gate_up: Tensor
    activated_TF: QuantizedRows
    selected_RH: Tensor
    selected_q: QuantizedRows
    logits_RV: Tensor
    argmax_R: Tensor
    max_R: Tensor
    lse_R: Tensor

    @classmethod
    def empty(cls, spec: DecoderSpec, max_rows: int) -> "_Buffers":
        hidden, ffn = spec.hidden_size, spec.ffn_size
        attended = spec.q_size
        return cls(
            hidden_TH=torch.empty(max_rows, hidden),
            input_TH=QuantizedRows.empty(max_rows, hidden),
            qkv=torch.empty(max_rows, attended + 2 * spec.kv_size),
            attended=torch.empty(max_rows, attended),
            attended_q=QuantizedRows.empty(max_rows, attended),
            gate_up=torch.empty(max_rows, 2 * ffn),
            activated_TF=QuantizedRows.empty(max_rows, ffn),
            selected_RH=torch.empty(_HEAD_ROWS, hidden),
            selected_q=QuantizedRows.empty(_HEAD_ROWS, hidden),
            logits_RV=torch.empty(_HEAD_ROWS, spec.vocab_size),
            argmax_R=torch.empty(_HEAD_ROWS, dtype=torch.int32),
            max_R=torch.empty(_HEAD_ROWS),
            lse_R=torch.empty(_HEAD_ROWS),
        )


def _joined(parts: list[RowStats]) -> RowStats:
    return RowStats(
        torch.cat([part.argmax_R for part in parts]),
        torch.cat([part.max_R for part in parts]),
        torch.cat([part.lse_R for part in parts]),
    )


def _native_batch(batch: ForwardBatch, selected: Tensor) -> Batch:
    lengths = torch.tensor(batch.query_starts).diff()
    slots = batch.adapter_slots
    return Batch(
        token_ids=batch.token_ids_T.to(torch.int32),
        positions=batch.positions_T.to(torch.int32),
        sequence=_per_row(range(len(lengths)), lengths),
        block_tables=batch.block_tables_SN,
        slot_mapping=batch.slot_mapping_T,
        selected_rows=selected,
        lora_slot=None if slots is None else _per_row(slots, lengths),
    )


def _per_row(values: Sequence[int], lengths: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.int32), lengths)


def _with_selected(rows: Batch, selected: Tensor) -> Batch:
    return replace(rows, selected_rows=selected)

"""Adapters in the slots that one launch reads for all rows of a batch.

Owns the slots' memory, taken once so that captured graphs may refer to it, and the packing of an
adapter into its slot. Knows nothing of files or sequences. Written by the thread that loads an
adapter, into a slot that no sequence has; read in the engine child's main thread.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from heedful_kernels.lora import LoraWeights

from heedful_server.model.adapter import AdapterWeights
from heedful_server.model.lora import LayerUpdates, Update, make_adapter
from heedful_server.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """All slots of one layer's four fused linears."""

    qkv: LoraWeights
    attn_out: LoraWeights
    mlp_in: LoraWeights
    mlp_out: LoraWeights


class AdapterSlots:
    """Room for `num_slots` adapters of ranks up to `max_rank`."""

    def __init__(
        self,
        spec: DecoderSpec,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self._spec, self._dtype, self._device = spec, dtype, device
        q, kv, ffn = spec.q_size, spec.kv_size, spec.ffn_size

        def room(columns: int, *widths: int) -> LoraWeights:
            bounds = tuple(itertools.accumulate(widths, initial=0))
            shape_a = (num_slots, len(widths) * max_rank, columns)
            return LoraWeights(
                torch.zeros(shape_a, dtype=dtype, device=device),
                torch.zeros((num_slots, bounds[-1], max_rank), dtype=dtype, device=device),
                # An adapter's own scale is in its b.
                torch.ones(num_slots, device=device),
                bounds,
            )

        self.layers = tuple(
            LayerSlots(
                qkv=room(spec.hidden_size, q, kv, kv),
                attn_out=room(q, spec.hidden_size),
                mlp_in=room(spec.hidden_size, *([ffn, ffn] if spec.gated_mlp else [ffn])),
                mlp_out=room(ffn, spec.hidden_size),
            )
            for _ in range(spec.num_layers)
        )

    def load(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot; its bytes there. Returns once the device has it."""
        if self._device.type != "cuda":
            self._write(slot, weights)
        else:
            # Beside the steps, not between them; but after what was queued to empty the slot.
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(stream):
                self._write(slot, weights)
            stream.synchronize()
        return sum(
            room.a[slot].nbytes + room.b[slot].nbytes
            for layer in self.layers
            for room in (layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out)
        )

    def _write(self, slot: int, weights: AdapterWeights) -> None:
        adapter = make_adapter(weights, self._spec, torch.float32, self._device)
        self.clear(slot)
        for layer, updates in zip(self.layers, adapter.layers, strict=True):
            for room, update in _pairs(layer, updates):
                _fill(room, slot, update)

    def clear(self, slot: int) -> None:
        """Fill a slot with zeros, so that it adds nothing."""
        for layer in self.layers:
            for room in (layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out):
                room.a[slot].zero_()
                room.b[slot].zero_()


def _pairs(layer: LayerSlots, updates: LayerUpdates) -> Sequence[tuple[LoraWeights, Update]]:
    return (
        (layer.qkv, updates.qkv),
        (layer.attn_out, updates.attn_out),
        (layer.mlp_in, updates.mlp_in),
        (layer.mlp_out, updates.mlp_out),
    )


def _fill(room: LoraWeights, slot: int, update: Update) -> None:
    max_rank = room.b.shape[2]
    for segment in update:
        place = room.bounds.index(segment.start) * max_rank
        rank = segment.a_KR.shape[1]
        room.a[slot, place : place + rank] = segment.a_KR.t().to(room.a.dtype)
        room.b[slot, segment.start : segment.end, :rank] = segment.b_RN.t().to(room.b.dtype)

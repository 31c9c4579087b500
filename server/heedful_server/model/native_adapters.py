"""Adapter slots of the native decoder, one set for each linear, and what the programs need of them.

Owns the stacking of an adapter's parts into the fused linears (q|k|v, gate|up) and the buffers of
the low-rank products. Knows nothing of files or requests. A slot that no row has may be written
from the thread that loads adapters while a program runs: kernels read no other slots than those of
their rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from heedful_kernels.cpu import LoraSlots, ProgramBuilder
from torch import Tensor

from heedful_server.model.adapter import AdapterWeights, LowRank
from heedful_server.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class SlottedLinear:
    """The slots of one fused linear, and the parts that are stacked in it, with their widths."""

    slots: LoraSlots
    parts: tuple[tuple[str, int], ...]

    def load(self, slot: int, layer: Mapping[str, LowRank], rank: int, scale: float) -> int:
        """Put the adapter's parts into a slot; return their bytes, 0 when it has none here."""
        slots = self.slots
        if not any(name in layer for name, _ in self.parts):
            slots.ranks[slot] = 0
            return 0
        # A part that the adapter leaves alone gets an update of zero.
        a = [
            layer[name].a_RK if name in layer else torch.zeros(rank, slots.k)
            for name, _ in self.parts
        ]
        b = [
            layer[name].b_NR if name in layer else torch.zeros(width, rank)
            for name, width in self.parts
        ]
        slots.load(slot, a, b, scale)
        return slots.slot_bytes(rank)


@dataclass(frozen=True, slots=True)
class SlottedLayer:
    """The slots of one layer's four linears."""

    qkv: SlottedLinear
    output: SlottedLinear
    gate_up: SlottedLinear
    down: SlottedLinear


class NativeAdapters:
    """All slots of a model, and the fp32 rows and scratch memory of a step."""

    def __init__(self, spec: DecoderSpec, num_slots: int, max_rank: int, max_rows: int) -> None:
        hidden, ffn, attended, kv = spec.hidden_size, spec.ffn_size, spec.q_size, spec.kv_size

        def linear(num_inputs: int, **parts: int) -> SlottedLinear:
            slots = LoraSlots.empty(num_slots, num_inputs, tuple(parts.values()), max_rank)
            return SlottedLinear(slots, tuple(parts.items()))

        self.layers = [
            SlottedLayer(
                qkv=linear(hidden, q=attended, k=kv, v=kv),
                output=linear(attended, o=hidden),
                gate_up=linear(hidden, gate=ffn, up=ffn),
                down=linear(ffn, down=hidden),
            )
            for _ in range(spec.num_layers)
        ]
        self.input_TH = torch.empty(max_rows, hidden)
        self.activated_TF = torch.empty(max_rows, ffn)
        rank = self.layers[0].qkv.slots.max_rank
        # One for each number of stacked parts; the four linears take turns.
        self._scratch = {parts: torch.empty(max_rows, parts, rank) for parts in (1, 2, 3)}

    def load(self, slot: int, weights: AdapterWeights) -> int:
        """Put an adapter into a slot that no row has; return its bytes."""
        num_bytes = 0
        for linears, layer in zip(self.layers, weights.layers, strict=True):
            for linear in (linears.qkv, linears.output, linears.gate_up, linears.down):
                num_bytes += linear.load(slot, layer, weights.rank, weights.scale)
        return num_bytes

    def drop(self, slot: int) -> None:
        """Switch a slot off."""
        for linears in self.layers:
            for linear in (linears.qkv, linears.output, linears.gate_up, linears.down):
                linear.slots.ranks[slot] = 0

    def shrink(self, builder: ProgramBuilder, x_TK: Tensor, linear: SlottedLinear) -> None:
        """Append the product with A, which runs beside the op that is appended next."""
        scratch = self._scratch[len(linear.parts)]
        builder.lora_shrink(x_TK, linear.slots, scratch, overlap_next=True)

    def expand(self, builder: ProgramBuilder, linear: SlottedLinear, out_TN: Tensor) -> None:
        """Append the product with B, added to what the linear has computed."""
        builder.lora_expand(self._scratch[len(linear.parts)], linear.slots, out_TN)

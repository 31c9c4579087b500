"""Programs for the native CPU kernels: one decoder step, or any single op, as one C call.

Owns the checks of shapes, dtypes and alignment, and the references that keep the tensors behind raw
pointers alive. Knows nothing of models or schedulers. Used by the thread that runs the model: a
program and its pool serve one run at a time.
"""

from __future__ import annotations

import ctypes
import weakref
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from heedful_kernels.cpu.buffers import (
    POSITION_TILE,
    Activation,
    Batch,
    KVCache,
    LoraSlots,
    QuantizedRows,
    RopeTable,
)
from heedful_kernels.cpu.native import BatchPointers, Limits, NativeLibrary, Op, ThreadPool
from heedful_kernels.cpu.packing import GROUP, PackedWeight

_ALIGNMENT_BYTES: Final = 64
_SELECTED, _ACCUMULATE, _CENTERED, _OVERLAP = 1, 2, 4, 8
MAX_LORA_SEGMENTS: Final = 4


class _Kind(IntEnum):
    EMBED = 0
    NORM_QUANT = 1
    QUANT = 2
    LINEAR_Q4 = 3
    LINEAR_Q8 = 4
    ROPE_KV = 5
    ATTENTION = 6
    ACT_QUANT = 7
    GATHER_ROWS = 8
    LORA_SHRINK = 9
    LORA_EXPAND = 10
    ARGMAX_LSE = 11
    ADD_POSITION = 12


class Program:
    """A built program: holds its tensors until closed or collected. Made by `ProgramBuilder`."""

    def __init__(self, library: NativeLibrary, ops: list[Op], limits: Limits, keep: object) -> None:
        self.num_ops = len(ops)
        self._library = library
        self._keep = keep
        self._handle = library.create_program(ops, limits)
        self._freed = weakref.finalize(self, library.destroy_program, self._handle)

    def run(self, pool: ThreadPool, batch: Batch) -> None:
        """Runs every op; NativeKernelError, with nothing written, if the batch is refused."""
        self._run(pool, batch, None)

    def profile(self, pool: ThreadPool, batch: Batch) -> list[float]:
        """Runs once and returns each op's wall time in seconds."""
        seconds = (ctypes.c_double * self.num_ops)()
        self._run(pool, batch, seconds)
        return list(seconds)

    def close(self) -> None:
        """Frees the C side and lets go of the tensors; the program cannot be run again."""
        self._freed()
        self._keep = None

    def _run(
        self, pool: ThreadPool, batch: Batch, seconds: ctypes.Array[ctypes.c_double] | None
    ) -> None:
        if not self._freed.alive:
            raise ValueError("the program is closed")
        self._library.run(pool.handle, self._handle, _batch_pointers(batch), seconds)


class ProgramBuilder:
    """Collects ops over fixed buffers; every method appends one op (lora: two) and returns nothing.

    Buffers have `max_rows` rows (`max_selected` where `selected=True`); a run uses the first T (R).
    ValueError names the tensor whose shape, dtype, layout or alignment is wrong.
    """

    def __init__(self, library: NativeLibrary, *, max_rows: int, max_selected: int) -> None:
        self._library = library
        self._limits = Limits(max_rows, max_selected)
        self._ops: list[Op] = []
        self._keep: list[Tensor] = []

    def embed(self, table: Tensor | PackedWeight, out_TH: Tensor) -> None:
        """out = the table's rows for the token ids; table fp32 or bf16 [V, H], or packed."""
        if isinstance(table, PackedWeight):
            vocabulary, hidden = table.n, table.k
            table_format, source = {"q8": 2, "q4": 3}[table.kind], self._weight(table)
        else:
            vocabulary, hidden = table.shape
            table_format = {torch.float32: 0, torch.bfloat16: 1}[table.dtype]
            source = self._pointer("table", table, table.dtype, (vocabulary, hidden))
        out = self._rows("out_TH", out_TH, hidden)
        self._add(_Kind.EMBED, (hidden, vocabulary, table_format), (source,), (out,))

    def add_position(self, table_PH: Tensor, x_TH: Tensor) -> None:
        """x += a learned position embedding's rows for the batch's positions (GPT-2, OPT)."""
        positions, hidden = table_PH.shape
        table = self._pointer("table_PH", table_PH, torch.float32, (positions, hidden))
        x = self._rows("x_TH", x_TH, hidden)
        self._add(_Kind.ADD_POSITION, (hidden, positions), (table,), (x,))

    def norm(
        self,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        *,
        out: QuantizedRows | None = None,
        out_fp32_TH: Tensor | None = None,
        bias_H: Tensor | None = None,
        centered: bool = False,
        selected: bool = False,
    ) -> None:
        """RMSNorm (LayerNorm when `centered`) to int8 rows, fp32 (maybe x itself), or both."""
        hidden = x_TH.shape[-1]
        inputs = (
            self._rows("x_TH", x_TH, hidden, selected=selected),
            self._pointer("weight_H", weight_H, torch.float32, (hidden,)),
            self._optional("bias_H", bias_H, (hidden,)),
        )
        outputs = self._row_outputs(out, out_fp32_TH, hidden, selected=selected)
        flags = _SELECTED * selected | _CENTERED * centered
        self._add(_Kind.NORM_QUANT, (hidden,), inputs, outputs, params=(eps,), flags=flags)

    def quantize(self, x_TK: Tensor, out: QuantizedRows, *, selected: bool = False) -> None:
        """Rows to int8 with a scale per group of 32."""
        k = x_TK.shape[-1]
        inputs = (self._rows("x_TK", x_TK, k, selected=selected),)
        outputs = self._row_outputs(out, None, k, selected=selected)[:3]
        self._add(_Kind.QUANT, (k,), inputs, outputs, flags=_SELECTED * selected)

    def linear(
        self,
        x: QuantizedRows,
        weight: PackedWeight,
        out_TN: Tensor,
        *,
        bias_N: Tensor | None = None,
        accumulate: bool = False,
        selected: bool = False,
        overlap_next: bool = False,
    ) -> None:
        """out = x @ weight.T + bias, or out += that when `accumulate`."""
        inputs = (
            *self._row_outputs(x, None, weight.k, selected=selected)[:3],
            self._weight(weight),
            self._optional("bias_N", bias_N, (weight.n,)),
        )
        outputs = (self._rows("out_TN", out_TN, weight.n, selected=selected),)
        kind = _Kind.LINEAR_Q4 if weight.kind == "q4" else _Kind.LINEAR_Q8
        flags = _SELECTED * selected | _ACCUMULATE * accumulate | _OVERLAP * overlap_next
        self._add(kind, (weight.n, weight.k), inputs, outputs, flags=flags)

    def rope_kv(
        self,
        qkv: Tensor,
        cache: KVCache,
        *,
        q_heads: int,
        rope: RopeTable | None,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Normalises (if asked) and rotates q and k in `qkv`, and writes k and v to the cache.

        Args:
            qkv: fp32 [rows, (q_heads + 2 * kv_heads) * head_dim]; q and k change in place.
            cache: this layer's.
            q_heads: query heads.
            rope: None rotates nothing; rotary_dim < head_dim rotates the first dimensions.
            q_norm_D: RMSNorm weight of each query head; with k_norm_D or not at all.
            k_norm_D: RMSNorm weight of each key head.
            eps: of those norms.
        """
        d = cache.head_dim
        width = (q_heads + 2 * cache.kv_heads) * d
        rotary, positions, tables = 0, 2**31 - 1, (0, 0)
        if rope is not None:
            positions, half = rope.cos.shape
            rotary = 2 * half
            tables = (
                self._pointer("rope.cos", rope.cos, torch.float32, (positions, half)),
                self._pointer("rope.sin", rope.sin, torch.float32, (positions, half)),
            )
        norms = (
            self._optional("q_norm_D", q_norm_D, (d,)),
            self._optional("k_norm_D", k_norm_D, (d,)),
        )
        dims = (q_heads, cache.kv_heads, d, rotary, cache.block_size, cache.num_blocks, positions)
        outputs = (self._rows("qkv", qkv, width), *self._cache(cache))
        self._add(_Kind.ROPE_KV, dims, (*tables, *norms), outputs, params=(eps,))

    def attention(
        self,
        qkv: Tensor,
        cache: KVCache,
        out: Tensor,
        *,
        q_heads: int,
        max_positions: int,
        scale: float | None = None,
    ) -> None:
        """Causal attention of every row over its sequence's cached positions.

        Args:
            qkv: as `rope_kv` left it.
            cache: this layer's.
            out: fp32 [rows, q_heads * head_dim].
            q_heads: a multiple of the cache's kv_heads.
            max_positions: the longest context a run may have; sizes scratch memory.
            scale: None is head_dim ** -0.5.
        """
        d = cache.head_dim
        width = (q_heads + 2 * cache.kv_heads) * d
        dims = (q_heads, cache.kv_heads, d, cache.block_size, cache.num_blocks, max_positions)
        inputs = (self._rows("qkv", qkv, width), *self._cache(cache))
        outputs = (self._rows("out", out, q_heads * d),)
        scale = d**-0.5 if scale is None else scale
        self._add(_Kind.ATTENTION, dims, inputs, outputs, params=(scale,))

    def activation(
        self,
        x: Tensor,
        activation: Activation = Activation.SWIGLU,
        *,
        out: QuantizedRows | None = None,
        out_fp32_TF: Tensor | None = None,
    ) -> None:
        """silu(gate) * up of x = [gate | up], or another activation, to int8 rows, fp32 or both."""
        width = x.shape[-1]
        features = width // 2 if activation.gated else width
        inputs = (self._rows("x", x, width),)
        outputs = self._row_outputs(out, out_fp32_TF, features, selected=False)
        self._add(_Kind.ACT_QUANT, (features, int(activation)), inputs, outputs)

    def gather_rows(self, x_TH: Tensor, out_RH: Tensor) -> None:
        """out[r] = x[selected_rows[r]]."""
        hidden = x_TH.shape[-1]
        inputs = (self._rows("x_TH", x_TH, hidden),)
        outputs = (self._rows("out_RH", out_RH, hidden, selected=True),)
        self._add(_Kind.GATHER_ROWS, (hidden,), inputs, outputs, flags=_SELECTED)

    def lora_shrink(
        self, x_TK: Tensor, slots: LoraSlots, scratch: Tensor, *, overlap_next: bool = False
    ) -> None:
        """scratch [rows, segments, max_rank] = A_s x_t for every row t with a slot s.

        With `overlap_next` the next op (the base linear) runs at the same time.
        """
        inputs = (
            self._rows("x_TK", x_TK, slots.k),
            self._pointer("a", slots.a, slots.a.dtype, tuple(slots.a.shape)),
            self._pointer("ranks", slots.ranks, torch.int32, tuple(slots.ranks.shape)),
        )
        outputs = (self._lora_scratch(slots, scratch),)
        dims = (slots.k, *self._lora_dims(slots))
        self._add(_Kind.LORA_SHRINK, dims, inputs, outputs, flags=_OVERLAP * overlap_next)

    def lora_expand(self, scratch: Tensor, slots: LoraSlots, out_TN: Tensor) -> None:
        """out_t += scale_s * B_s scratch_t for every row t with a slot s."""
        segments = len(slots.segment_ends)
        if not 1 <= segments <= MAX_LORA_SEGMENTS:
            raise ValueError(f"1 to {MAX_LORA_SEGMENTS} segments: {segments}")
        inputs = (
            self._lora_scratch(slots, scratch),
            self._pointer("b", slots.b, slots.a.dtype, tuple(slots.b.shape)),
            self._pointer("ranks", slots.ranks, torch.int32, tuple(slots.ranks.shape)),
            self._pointer("scales", slots.scales, torch.float32, tuple(slots.ranks.shape)),
        )
        outputs = (self._rows("out_TN", out_TN, slots.n),)
        dims = (slots.n, *self._lora_dims(slots), *slots.segment_ends)
        self._add(_Kind.LORA_EXPAND, dims, inputs, outputs)

    def argmax_lse(self, logits_RV: Tensor, argmax_R: Tensor, max_R: Tensor, lse_R: Tensor) -> None:
        """Each row's lowest best id (int32; -1 if the row holds a NaN), maximum and log-sum-exp."""
        rows, vocabulary = self._limits.max_selected, logits_RV.shape[-1]
        inputs = (self._rows("logits_RV", logits_RV, vocabulary, selected=True),)
        outputs = (
            self._pointer("argmax_R", argmax_R, torch.int32, (rows,)),
            self._pointer("max_R", max_R, torch.float32, (rows,)),
            self._pointer("lse_R", lse_R, torch.float32, (rows,)),
        )
        self._add(_Kind.ARGMAX_LSE, (vocabulary,), inputs, outputs, flags=_SELECTED)

    def build(self) -> Program:
        """Freezes the ops; NativeKernelError names the op that the library refuses."""
        return Program(self._library, self._ops, self._limits, self._keep)

    def _add(
        self,
        kind: _Kind,
        dims: tuple[int, ...],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        params: tuple[float, ...] = (),
        flags: int = 0,
    ) -> None:
        op = Op(kind=int(kind), flags=flags)
        op.dims[: len(dims)] = dims
        op.params[: len(params)] = params
        op.inputs[: len(inputs)] = inputs
        op.outputs[: len(outputs)] = outputs
        self._ops.append(op)

    def _pointer(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> int:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            wanted = f"{dtype} {list(shape)}"
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, wanted {wanted}")
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be contiguous and on the CPU")
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            raise ValueError(f"{name} is not aligned to {_ALIGNMENT_BYTES} bytes")
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _optional(self, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int:
        return 0 if tensor is None else self._pointer(name, tensor, torch.float32, shape)

    def _rows(self, name: str, tensor: Tensor, width: int, *, selected: bool = False) -> int:
        rows = self._limits.max_selected if selected else self._limits.max_rows
        return self._pointer(name, tensor, torch.float32, (rows, width))

    def _row_outputs(
        self, rows: QuantizedRows | None, fp32: Tensor | None, k: int, *, selected: bool
    ) -> tuple[int, int, int, int]:
        plain = 0 if fp32 is None else self._rows("fp32 rows", fp32, k, selected=selected)
        if rows is None:
            return (0, 0, 0, plain)
        count = self._limits.max_selected if selected else self._limits.max_rows
        values = self._pointer("values_TK", rows.values, torch.int8, (count, k))
        scale = self._rows("scale_TG", rows.scale, k // GROUP, selected=selected)
        sums = self._rows("sums_TG", rows.sums, k // GROUP, selected=selected)
        return (values, scale, sums, plain)

    def _lora_scratch(self, slots: LoraSlots, scratch: Tensor) -> int:
        shape = (self._limits.max_rows, len(slots.segment_ends), slots.max_rank)
        return self._pointer("scratch", scratch, torch.float32, shape)

    @staticmethod
    def _lora_dims(slots: LoraSlots) -> tuple[int, int, int, int]:
        count, is_bf16 = slots.ranks.shape[0], int(slots.a.dtype == torch.bfloat16)
        return slots.max_rank, len(slots.segment_ends), count, is_bf16

    def _weight(self, weight: PackedWeight) -> int:
        return self._pointer("weight", weight.data, torch.uint8, (weight.num_bytes,))

    def _cache(self, cache: KVCache) -> tuple[int, int]:
        blocks, heads, size, d = cache.num_blocks, cache.kv_heads, cache.block_size, cache.head_dim
        keys = (blocks, heads, size // POSITION_TILE, d // 2, POSITION_TILE, 2)
        values = (blocks, heads, size, -(-d // 32) * 32)
        return (
            self._pointer("cache.keys", cache.keys, torch.bfloat16, keys),
            self._pointer("cache.values", cache.values, torch.bfloat16, values),
        )


def _batch_pointers(batch: Batch) -> BatchPointers:
    rows = batch.token_ids.shape[0]
    sequences, max_blocks = batch.block_tables.shape
    int32, int64 = torch.int32, torch.int64
    lora = batch.lora_slot
    return BatchPointers(
        rows,
        batch.selected_rows.shape[0],
        sequences,
        max_blocks,
        _indices("token_ids", batch.token_ids, int32, rows),
        _indices("positions", batch.positions, int32, rows),
        _indices("sequence", batch.sequence, int32, rows),
        _indices("block_tables", batch.block_tables, int32, sequences),
        _indices("slot_mapping", batch.slot_mapping, int64, rows),
        _indices("selected_rows", batch.selected_rows, int32, batch.selected_rows.shape[0]),
        0 if lora is None else _indices("lora_slot", lora, int32, rows),
    )


def _indices(name: str, tensor: Tensor, dtype: torch.dtype, rows: int) -> int:
    if tensor.dtype != dtype or tensor.shape[0] != rows or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} with {rows} rows")
    return tensor.data_ptr()

"""Times a decoder-shaped program of the native CPU kernels: ms per step, bandwidth, share per op.

Owns a SmolLM2-135M-shaped program with random weights. Knows nothing of the engine: no sampling, no
scheduling. Runs a bit-for-bit and a reference check first and prints no figure if one fails.

    python benchmarks/cpu_kernels.py [--rows 1 8 32] [--context 150] [--threads 2] [--lora N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from heedful_kernels.cpu import (
    Arena,
    Batch,
    KVCache,
    LoraSlots,
    PackedWeight,
    Program,
    ProgramBuilder,
    QuantizedRows,
    RopeTable,
    ThreadPool,
    load,
    packed_bytes,
    reference,
)
from torch import Tensor

HIDDEN, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 576, 30, 9, 3, 64, 1536, 49152
BLOCK_SIZE = 16
QKV = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, Q_HEADS * HEAD_DIM),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
RANK = 16


@dataclass(frozen=True)
class Decoder:
    """A program, the buffers worth looking at, and what each of its ops is called."""

    program: Program
    op_names: list[str]
    hidden: Tensor
    logits: Tensor
    argmax: Tensor
    weight_bytes: int


def random_weight(kind: str, n: int, k: int, arena: Arena) -> PackedWeight:
    """Random quants with scales that keep activations near 1, written straight into the layout."""
    data = arena.take(packed_bytes(kind, n, k))
    scale = 1.0 / (k**0.5 * (7.0 if kind == "q4" else 70.0))
    d = torch.tensor([scale]).half().view(torch.uint8)
    if kind == "q4":
        tiles = data.view(-1, 320)
        tiles[:, :256].random_(0, 256)
        tiles[:, 256:288] = d.repeat(16)
        tiles[:, 288:] = (torch.tensor([-7.5 * scale]).half().view(torch.uint8)).repeat(16)
    else:
        tiles = data.view(-1, 1088)
        tiles[:, :1024].random_(0, 256)
        tiles[:, 1024:] = d.repeat(32)
    return PackedWeight(kind, n, k, data)


def make_decoder(library, max_rows: int, blocks: int, adapters: int) -> Decoder:
    """The whole step, tokens to argmax, over `blocks` cache blocks a layer."""
    torch.manual_seed(0)
    total = LAYERS * sum(packed_bytes("q4", *shape) for shape in SHAPES.values())
    total += packed_bytes("q8", VOCABULARY, HIDDEN)
    arena = Arena(total + 64 * 1024)
    head = random_weight("q8", VOCABULARY, HIDDEN, arena)
    angles = torch.arange(8192)[:, None] * 100000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    rope = RopeTable(angles.cos().contiguous(), angles.sin().contiguous())
    x, normed = torch.zeros(max_rows, HIDDEN), torch.zeros(max_rows, HIDDEN)
    qkv, mixed = torch.zeros(max_rows, QKV), torch.zeros(max_rows, HIDDEN)
    gate_up, ffn = torch.zeros(max_rows, 2 * FFN), torch.zeros(max_rows, FFN)
    rows, wide = QuantizedRows.empty(max_rows, HIDDEN), QuantizedRows.empty(max_rows, FFN)
    logits, argmax = torch.zeros(max_rows, VOCABULARY), torch.zeros(max_rows, dtype=torch.int32)
    best, lse = torch.zeros(max_rows), torch.zeros(max_rows)
    ones = torch.ones(HIDDEN)
    builder = ProgramBuilder(library, max_rows=max_rows, max_selected=max_rows)
    names: list[str] = []

    def linear(name, source, plain, out, *, accumulate=False):
        weight = random_weight("q4", *SHAPES[name], arena)
        if adapters:
            slots = random_slots(name, adapters)
            scratch = torch.zeros(max_rows, len(slots.segment_ends), RANK)
            # Overlapping ops end together, so the shrink is booked with its linear.
            builder.lora_shrink(plain, slots, scratch, overlap_next=True)
            names.append(name)
        builder.linear(source, weight, out, accumulate=accumulate)
        names.append(name)
        if adapters:
            builder.lora_expand(scratch, slots, out)
            names.append("lora_expand")

    builder.embed(head, x)
    names.append("embed")
    for _ in range(LAYERS):
        cache = KVCache.empty(blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        cache.keys.normal_()
        cache.values.normal_()
        fp32 = {"out_fp32_TH": normed} if adapters else {}
        builder.norm(x, ones, 1e-5, out=rows, **fp32)
        names.append("norm")
        linear("qkv", rows, normed, qkv)
        builder.rope_kv(qkv, cache, q_heads=Q_HEADS, rope=rope)
        builder.attention(qkv, cache, mixed, q_heads=Q_HEADS, max_positions=8192)
        builder.quantize(mixed, rows)
        names += ["rope_kv", "attention", "quantize"]
        linear("o", rows, mixed, x, accumulate=True)
        builder.norm(x, ones, 1e-5, out=rows, **fp32)
        names.append("norm")
        linear("gate_up", rows, normed, gate_up)
        builder.activation(gate_up, out=wide, **({"out_fp32_TF": ffn} if adapters else {}))
        names.append("swiglu")
        linear("down", wide, ffn, x, accumulate=True)
    builder.norm(x, ones, 1e-5, out=rows, selected=True)
    builder.linear(rows, head, logits, selected=True)
    builder.argmax_lse(logits, argmax, best, lse)
    names += ["norm", "head", "argmax"]
    return Decoder(builder.build(), names, x, logits, argmax, total)


def random_slots(name: str, adapters: int) -> LoraSlots:
    """Adapters of rank 16 in bf16, the stacked linears with a segment per part."""
    n, k = SHAPES[name]
    widths = {"qkv": (576, 192, 192), "gate_up": (FFN, FFN)}.get(name, (n,))
    slots = LoraSlots.empty(adapters, k, widths, RANK)
    for slot in range(adapters):
        a = [torch.randn(RANK, k) * 0.01 for _ in widths]
        slots.load(slot, a, [torch.randn(width, RANK) * 0.01 for width in widths], 1.0)
    return slots


def make_batch(rows: int, context: int, adapters: int, *, only: int | None = None) -> Batch:
    """One row per sequence at position context - 1; `only` keeps a single row of it."""
    per_sequence = -(-context // BLOCK_SIZE)
    tables = torch.arange(rows * per_sequence, dtype=torch.int32).view(rows, per_sequence)
    keep = torch.arange(rows) if only is None else torch.tensor([only])
    last = context - 1
    slots = tables[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE
    lora = torch.arange(rows, dtype=torch.int32) % adapters if adapters else None
    return Batch(
        token_ids=(torch.arange(rows, dtype=torch.int32) * 997 % VOCABULARY)[keep],
        positions=torch.full((len(keep),), last, dtype=torch.int32),
        sequence=keep.int(),
        block_tables=tables,
        slot_mapping=slots[keep],
        selected_rows=torch.arange(len(keep), dtype=torch.int32),
        lora_slot=None if lora is None else lora[keep],
    )


def check(library, pool: ThreadPool, decoder: Decoder, rows: int, context: int, adapters: int):
    """A linear against the reference, and the last row's logits alone against in the batch."""
    weight = random_weight("q4", 64, HIDDEN, Arena(1 << 20))
    x = reference.quantize_rows(torch.randn(rows, HIDDEN))
    out = torch.full((rows, 64), float("nan"))
    builder = ProgramBuilder(library, max_rows=rows, max_selected=1)
    builder.linear(x, weight, out)
    batch = make_batch(rows, 1, 0)
    builder.build().run(pool, Batch(**{**vars(batch), "selected_rows": batch.selected_rows[:0]}))
    torch.testing.assert_close(out, reference.linear(x, weight), rtol=1e-5, atol=1e-5)
    decoder.program.run(pool, make_batch(rows, context, adapters))
    together = decoder.logits[rows - 1].clone()
    decoder.program.run(pool, make_batch(rows, context, adapters, only=rows - 1))
    if not torch.equal(decoder.logits[0], together) or not together.isfinite().all():
        raise AssertionError("a row's logits depend on its neighbours")


def read_bandwidth(threads: int) -> float:
    """Bytes per second of summing 256 MiB: what the memory gives a plain reader."""
    torch.set_num_threads(threads)
    memory = torch.zeros(64 << 20)
    best = min(_timed(memory.sum) for _ in range(8))
    return memory.numel() * 4 / best


def _timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def report(pool, decoder: Decoder, rows: int, context: int, adapters: int, bandwidth: float):
    """Prints the step time of one row count and where it went."""
    batch = make_batch(rows, context, adapters)
    for _ in range(5):
        decoder.program.run(pool, batch)
    times = [
        _timed(lambda: decoder.program.run(pool, batch)) for _ in range(60 if rows < 9 else 25)
    ]
    kv_bytes = rows * context * LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    step, best = statistics.median(times), min(times)
    floor = (decoder.weight_bytes + kv_bytes) / bandwidth
    print(
        f"rows {rows:3d}  {1e3 * step:7.2f} ms/step (best {1e3 * best:.2f})"
        f"  {rows / step:7.0f} tok/s (best {rows / best:.0f})"
        f"  {decoder.weight_bytes / step / 1e9:5.1f} GB/s of weights"
        f"  byte floor {1e3 * floor:.2f} ms"
    )
    shares: dict[str, float] = defaultdict(float)
    for _ in range(5):
        for name, seconds in zip(
            decoder.op_names, decoder.program.profile(pool, batch), strict=True
        ):
            shares[name] += seconds / 5
    print(
        "    "
        + "  ".join(f"{n} {1e3 * s:.2f}" for n, s in sorted(shares.items(), key=lambda i: -i[1]))
    )


def main() -> int:
    """Checks, then reports every row count asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    parser.add_argument("--lora", type=int, default=0, help="different adapters in the batch")
    arguments = parser.parse_args()
    library = load(arguments.isa)
    if library is None:
        print("no library: run python -m heedful_kernels.cpu.build")
        return 1
    most = max(arguments.rows)
    blocks = most * -(-arguments.context // BLOCK_SIZE)
    decoder = make_decoder(library, most, blocks, arguments.lora)
    bandwidth = read_bandwidth(arguments.threads)
    print(
        f"{library.isa}, {arguments.threads} threads, context {arguments.context},"
        f" {decoder.weight_bytes / 1e6:.0f} MB of weights, {bandwidth / 1e9:.1f} GB/s read"
    )
    with ThreadPool(library, arguments.threads) as pool:
        check(library, pool, decoder, most, arguments.context, arguments.lora)
        for rows in arguments.rows:
            report(pool, decoder, rows, arguments.context, arguments.lora, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())

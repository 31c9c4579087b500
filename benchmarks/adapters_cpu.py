"""What adapters cost a decode step on a CPU: none, one for all rows, four different ones.

The default model on the native kernels, rank-16 adapters on all linears with random weights, one
decoder step (layers and head) at a time. The arms take turns step by step over the same sequences,
so that whatever else the machine does falls on all of them; the ratio is the median over rounds of
an arm's step to the step without adapters in the same round. Correctness comes first: if a row's
bits depend on its neighbours' adapters, no figure is printed.

Usage: python benchmarks/adapters_cpu.py [--model DIR] [--rows 1 8 32] [--seconds 20] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from heedful_server.model.adapter import AdapterWeights, LowRank
from heedful_server.model.batch import ForwardBatch
from heedful_server.model.load import load_best_decoder
from heedful_server.model.native_decoder import NativeDecoder
from heedful_server.model.spec import DecoderSpec
from heedful_server.protocol import EngineConfig

RANK = 16
NUM_SLOTS = 8
MAX_RANK = 64
BLOCK = 16
CONTEXT = 96
ARMS = {"none": 0, "one": 1, "four": 4}
TARGETS = {"one": 1.10, "four": 1.25}
DEFAULT_MODEL = Path.home() / ".heedful" / "models" / "SmolLM2-135M-Instruct"


def random_adapter(spec: DecoderSpec, seed: int) -> AdapterWeights:
    """A rank-16 adapter on every linear."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, q, kv = spec.hidden_size, spec.ffn_size, spec.q_size, spec.kv_size
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}

    def low_rank(n: int, k: int) -> LowRank:
        a_RK = torch.randn(RANK, k, generator=generator) * k**-0.5
        return LowRank(a_RK, torch.randn(n, RANK, generator=generator) * 0.02)

    layers = tuple(
        {name: low_rank(*shape) for name, shape in shapes.items()} for _ in range(spec.num_layers)
    )
    return AdapterWeights(RANK, 2.0, layers)


def decode_batch(rows: int, position: int, slots: Sequence[int]) -> ForwardBatch:
    """One token of each of some sequences; sequence s owns a run of blocks."""
    per_sequence = -(-CONTEXT // BLOCK)
    tables = torch.arange(rows * per_sequence, dtype=torch.int32).view(rows, per_sequence)
    return ForwardBatch(
        token_ids_T=torch.arange(rows) * 37 + 1000,
        positions_T=torch.full((rows,), position),
        slot_mapping_T=tables[:, position // BLOCK].long() * BLOCK + position % BLOCK,
        block_tables_SN=tables,
        query_starts=tuple(range(rows + 1)),
        context_lens=(position + 1,) * rows,
        logit_rows_R=torch.arange(rows),
        adapter_slots=tuple(slots) if max(slots) >= 0 else None,
    )


def slots_of(arm: str, rows: int) -> list[int]:
    """Which adapter each row has."""
    count = ARMS[arm]
    return [row % count if count else -1 for row in range(rows)]


def fill(decoder: NativeDecoder, cache: object, rows: int, arm: str) -> None:
    """Write every position before the measured one."""
    for position in range(CONTEXT - 1):
        decoder.forward(decode_batch(rows, position, slots_of(arm, rows)), cache)


def check(decoder: NativeDecoder, cache: object) -> None:
    """Raise SystemExit unless rows have the same bits among rows with other adapters."""
    rows = 6

    def logits(slots: list[int]) -> torch.Tensor:
        batch = decode_batch(rows, 0, slots)
        return decoder.forward(batch, cache).logits_RV.clone()

    mixed = logits([-1, 0, 1, 2, 3, -1])
    for slots in ([-1] * rows, *([slot] * rows for slot in range(4))):
        alone = logits(slots)
        for row, slot in enumerate([-1, 0, 1, 2, 3, -1]):
            if slot == slots[row] and not torch.equal(mixed[row], alone[row]):
                raise SystemExit("a row's bits depend on its neighbours: no figures")
    if torch.equal(mixed[0], logits([0] * rows)[0]):
        raise SystemExit("the adapter has no effect: no figures")


def measure(decoder: NativeDecoder, cache: object, rows: int, seconds: float) -> dict[str, object]:
    """Step times by arm, in turns; ratios to the arm without adapters of the same round."""
    fill(decoder, cache, rows, "none")
    batches = {arm: decode_batch(rows, CONTEXT - 1, slots_of(arm, rows)) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    until = time.perf_counter() + seconds
    order = list(ARMS)
    while time.perf_counter() < until:
        for arm in order:
            started = time.perf_counter()
            decoder.forward(batches[arm], cache)
            times[arm].append(time.perf_counter() - started)
        order = order[1:] + order[:1]
    ratios = {
        arm: [t / base for t, base in zip(times[arm], times["none"], strict=True)]
        for arm in ARMS
        if arm != "none"
    }
    return {
        "rows": rows,
        "rounds": len(times["none"]),
        "median_step_ms": {arm: 1e3 * statistics.median(values) for arm, values in times.items()},
        "fastest_step_ms": {arm: 1e3 * min(values) for arm, values in times.items()},
        "fastest_ratio": {arm: min(times[arm]) / min(times["none"]) for arm in ratios},
        "tokens_per_s": {arm: rows / statistics.median(values) for arm, values in times.items()},
        "median_ratio": {arm: statistics.median(values) for arm, values in ratios.items()},
        "ratio_quartiles": {arm: statistics.quantiles(v, n=4)[::2] for arm, v in ratios.items()},
    }


def main() -> None:
    """Check, measure, print, and write the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of rows")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    load_before = os.getloadavg()[0]
    config = EngineConfig(str(given.model), device="cpu", num_threads=given.threads)
    decoder = load_best_decoder(config, lambda stage, share: None)
    if not isinstance(decoder, NativeDecoder):
        raise SystemExit(f"not on the native kernels: {decoder.fallbacks}")
    decoder.reserve_adapters(NUM_SLOTS, MAX_RANK)
    num_bytes = [
        decoder.load_adapter(slot, random_adapter(decoder.spec, slot)) for slot in range(4)
    ]
    most = max(given.rows, default=1)
    cache = decoder.allocate_kv_cache(max(most, 6) * -(-CONTEXT // BLOCK), BLOCK)
    check(decoder, cache)
    measured = [measure(decoder, cache, rows, given.seconds) for rows in given.rows]
    for row in measured:
        print(json.dumps(row))
    result = {
        "benchmark": "adapters_cpu",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        # Above 1 before the start, or above the number of cores after it, others were at work too.
        "load_average_1min": {"before": load_before, "after": os.getloadavg()[0]},
        "kernel_path": decoder.kernel_path,
        "shape": {"context": CONTEXT, "rank": RANK, "linears": "all", "dtype": "bf16"},
        "adapter_bytes": num_bytes[0],
        "weight_bytes": decoder.weight_bytes,
        "targets": TARGETS,
        "results": measured,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

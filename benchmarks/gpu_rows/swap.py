"""What loading adapters does to the steps beside it: p99 of a decode step, alone and during swaps.

That no request is refused or cut during a swap is the engine tests' matter, on any device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import torch
from heedful_server.model.adapter import AdapterWeights, LowRank
from heedful_server.model.cuda_decoder import CudaDecoder

from gpu_rows.common import Row
from gpu_rows.llama import SPEC, make_cache, make_decoder, step_batch, step_call

RANK, SLOTS, BATCH, STEPS = 16, 9, 32, 300


def rows() -> Iterator[Row]:
    """One row: the step's p99 while another thread loads one adapter after another."""
    decoder = make_decoder("nf4")
    decoder.reserve_adapters(SLOTS, RANK)
    cache = make_cache(decoder, BATCH)
    run = step_call(decoder, step_batch(BATCH, adapters=True), cache)
    for _ in range(5):
        run()
    alone = _p99(run)
    stop = threading.Event()
    loads: list[float] = []
    thread = threading.Thread(target=_keep_loading, args=(decoder, stop, loads))
    thread.start()
    try:
        during = _p99(run)
    finally:
        stop.set()
        thread.join()
    yield Row(
        "adapter swap under load",
        f"batch {BATCH}, p99 of {STEPS} steps, {len(loads)} loads meanwhile",
        "ms a step",
        figure=during * 1e3,
        floor=alone * 1e3,
        target="p99 ≤ +10 % during the swap",
        note=f"{(during / alone - 1) * 100:.1f} % over the p99 without loads",
    )


def _p99(run: Callable[[], object]) -> float:
    times = []
    for _ in range(STEPS):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return sorted(times)[int(0.99 * len(times))]


def _keep_loading(decoder: CudaDecoder, stop: threading.Event, loads: list[float]) -> None:
    weights = random_adapter()
    while not stop.is_set():
        started_s = time.perf_counter()
        # The last slot, which no row of the batch has.
        decoder.load_adapter(SLOTS - 1, weights)
        loads.append(time.perf_counter() - started_s)


def random_adapter() -> AdapterWeights:
    """An adapter on all linears, in host memory as read from a file."""
    q, kv, hidden, ffn = SPEC.q_size, SPEC.kv_size, SPEC.hidden_size, SPEC.ffn_size
    shapes = {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
        "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn),
    }  # fmt: skip
    layer = {
        name: LowRank(torch.randn(RANK, columns) * 0.01, torch.randn(rows, RANK) * 0.01)
        for name, (rows, columns) in shapes.items()
    }
    return AdapterWeights(RANK, 1.0, (layer,) * SPEC.num_layers)

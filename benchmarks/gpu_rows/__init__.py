"""The figures of `benchmarks/gpu.py`, topic by topic.

Owns the list of topics, which tests each rests on, and the rows of those that cannot be measured. A
topic that raises gives a row that says so, and the others go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from gpu_rows import attention, decode, logprob, products, sampling, swap
from gpu_rows.common import Row, copy_bandwidth, deadline_of

Topic = tuple[tuple[str, ...], Callable[[], Iterator[Row]]]

_STEP_TESTS = ("test_cuda_decoder", "test_rmsnorm", "test_rope_cache", "test_paged_attention",
               "test_swiglu", "test_sample")  # fmt: skip
TOPICS: dict[str, Topic] = {
    "decode": ((*_STEP_TESTS, "test_nf4_matmul"), decode.rows),
    "products": (("test_nf4_matmul",), products.rows),
    "sample": (("test_sample",), sampling.rows),
    "attention": (("test_paged_attention",), attention.rows),
    "adapters": ((*_STEP_TESTS, "test_nf4_matmul", "test_lora"), decode.adapter_rows),
    "deterministic": (
        (*_STEP_TESTS, "test_cuda_deterministic", "test_dense_matmul"),
        decode.deterministic_rows,
    ),
    "logprob": (("test_token_logprob",), logprob.rows),
    "swap": ((*_STEP_TESTS, "test_lora"), swap.rows),
}


def measure_all(
    outcomes: dict[str, list[int]], chosen: list[str], deadline_s: float
) -> list[dict[str, object]]:
    """The rows of all topics, or of the chosen ones, until the deadline on the monotonic clock."""
    deadline_of.seconds = deadline_s
    rows: list[Row] = []
    for name, (tests, measure) in TOPICS.items():
        if chosen and name not in chosen:
            continue
        reason = why_withheld(tests, outcomes)
        if not reason and time.monotonic() > deadline_s:
            reason = "not measured: the time was up"
        if reason:
            rows.append(Row(name, "", "", withheld=reason))
            continue
        print(f"measuring {name}", flush=True)
        try:
            rows += measure()
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(name, "", "", withheld=f"failed: {type(error).__name__}: {error}"))
        torch.cuda.empty_cache()
    return [asdict(row) | {"ratio": row.ratio} for row in rows]


def why_withheld(tests: tuple[str, ...], outcomes: dict[str, list[int]]) -> str:
    """Why a figure that rests on tests must not be given; "" when it may."""
    for name in tests:
        passed, failed = outcomes.get(name, (0, 0))
        if failed:
            return f"withheld: {failed} of {name} failed"
        if not passed:
            return f"withheld: {name} did not run"
    return ""


def measured_device() -> dict[str, object]:
    """What the figures were measured on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "copy_bytes_per_s": copy_bandwidth(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }

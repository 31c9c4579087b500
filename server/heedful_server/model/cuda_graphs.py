"""Replays of captured steps: one launch where a small step would be hundreds.

Owns the captured graphs, one per size of step, and their static tensors; a size is captured when it
first occurs. Knows neither weights nor kernels: it is handed the function that computes a step. All
graphs share one pool of memory, since never two run at once. What a step draws without edits and
masks is part of its graph; other draws follow it, on the device too. Used by the engine child's
main thread; the lock keeps other threads' work on the device out of a capture.

Not run on a GPU yet: the tests check the padded step that a graph would replay.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from heedful_server.model.batch import ForwardBatch, ForwardResult
from heedful_server.model.cuda_step import (
    CudaStep,
    StepSize,
    empty_step,
    fill_step,
    is_plain_decode,
    step_size,
)
from heedful_server.model.kv_cache import KVCache

# Kernels are compiled and scratch memory is taken before the capture.
_WARM_UPS: Final = 2

Compute = Callable[[CudaStep, KVCache], ForwardResult]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step, what it reads and what it leaves."""

    step: CudaStep
    graph: torch.cuda.CUDAGraph
    result: ForwardResult


class GraphedSteps:
    """Steps of one token per sequence, by size."""

    def __init__(self, compute: Compute, device_lock: threading.Lock) -> None:
        self._compute = compute
        self._device_lock = device_lock
        self._graphs: dict[StepSize, _Graph] = {}
        self._pool: Any = None

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether a batch is a step that a graph can replay."""
        return is_plain_decode(batch)

    def clear(self) -> None:
        """Forget all graphs: they refer to one cache."""
        self._graphs.clear()

    def run(self, batch: ForwardBatch, kv_cache: KVCache, context_tokens: int) -> ForwardResult:
        """The step's result, overwritten by the next step of any size."""
        size = step_size(batch, context_tokens)
        captured = self._graphs.get(size)
        if captured is None:
            with self._device_lock:
                captured = self._graphs[size] = self._capture(size, kv_cache)
        fill_step(captured.step, batch)
        captured.graph.replay()
        rows = len(batch.context_lens)
        result = captured.result
        drawn = None if result.drawn_6D is None else result.drawn_6D[:, :rows]
        return ForwardResult(result.logits_RV[:rows], None, result.hidden_QH, drawn)

    def _capture(self, size: StepSize, kv_cache: KVCache) -> _Graph:
        step = empty_step(size, kv_cache.block_size, kv_cache.data.device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._compute(step, kv_cache)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._compute(step, kv_cache)
        return _Graph(step, graph, result)

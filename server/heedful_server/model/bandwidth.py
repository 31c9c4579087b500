"""How fast a device's memory is, measured by copying: what a step's bytes are compared with.

Owns the measurement, which takes some tens of milliseconds and memory for as long. Other work on
the machine makes the figure smaller. Runs once while loading.
"""

import time
from collections.abc import Callable
from typing import Final

import torch

_CPU_BYTES: Final = 64 << 20
_GPU_BYTES: Final = 1 << 30
_COPIES: Final = 5


def measure_bandwidth(device: torch.device, num_bytes: int = 0) -> float:
    """Bytes that a copy reads and writes in a second, the best of a few copies.

    Args:
        device: whose memory is copied.
        num_bytes: how much is copied; 0 takes more than any cache of such devices holds.
    """
    size = num_bytes or _size(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    return 2 * size / min(timed(lambda: target.copy_(source)) for _ in range(_COPIES))


def _size(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BYTES
    # Little enough that a device which the weights nearly fill can do it too.
    return min(_GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 8)


def _timed_on_cpu(copy: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    copy()
    return time.perf_counter() - started_s


def _timed_on_gpu(copy: Callable[[], object]) -> float:
    begin, end = (
        torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
        torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
    )
    begin.record()
    copy()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3

"""What the GPU figures share: a row, timing over captured calls, buffers beyond the cache.

Owns no figure. Times are medians of replays of one graph that holds a call for each of several
buffers, so that neither launches from Python nor the level-two cache flatter anything.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from heedful_server.model.bandwidth import measure_bandwidth

# Several times the 60 MB of the reference device's level-two cache.
_ROTATED_BYTES = 256 << 20
_MOST_BUFFERS = 48

# When to stop, on the monotonic clock; set once by whoever runs the topics.
deadline_of = SimpleNamespace(seconds=float("inf"))


@dataclass
class Row:
    """A line of the table; floor and peers are in the figure's unit, lower better unless `rises`.

    A peer's value is a number, or a string that says why there is none.
    """

    what: str
    shape: str
    unit: str
    figure: float | None = None
    floor: float | None = None
    peers: dict[str, float | str] = field(default_factory=dict)
    target: str = ""
    rises: bool = False
    withheld: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than the best peer, or else which share of the floor is reached."""
        numbers = [value for value in self.peers.values() if isinstance(value, float)]
        if self.figure is None or not (numbers or self.floor):
            return None
        if numbers:
            best = max(numbers) if self.rises else min(numbers)
            return self.figure / best if self.rises else best / self.figure
        assert self.floor is not None
        return self.figure / self.floor if self.rises else self.floor / self.figure


def time_is_up() -> bool:
    """Whether the deadline has passed."""
    return time.monotonic() > deadline_of.seconds


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    return measure_bandwidth(torch.device("cuda"))


def num_buffers(bytes_each: int) -> int:
    """How many buffers of a size are more than the cache holds."""
    return max(2, min(_MOST_BUFFERS, -(-_ROTATED_BYTES // max(bytes_each, 1))))


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Seconds of one call, when all are captured one after another and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [calls[0], *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_event_seconds(graph.replay) for _ in range(replays)) / len(calls)


def eager_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of one call from Python, launches included."""
    for _ in range(2):
        call()
    return statistics.median(_event_seconds(call) for _ in range(repeats))


def peer_seconds(calls: Callable[[], Sequence[Callable[[], object]]]) -> float | str:
    """Seconds of a peer's call, or why there are none; its imports are part of `calls`."""
    try:
        made = calls()
    except ImportError as error:
        return f"absent ({error.name or error})"
    except Exception as error:
        return f"failed ({type(error).__name__}: {str(error)[:80]})"
    try:
        return graph_seconds(made)
    except Exception as captured:
        torch.cuda.synchronize()
        try:
            return eager_seconds(made[0])
        except Exception:
            return f"failed ({type(captured).__name__}: {str(captured)[:80]})"


def in_units(value: float | str, factor: float) -> float | str:
    """A peer's seconds in another unit; a reason stays as it is."""
    return value if isinstance(value, str) else value * factor


def _event_seconds(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3

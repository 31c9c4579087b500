"""What a load run asked for and what it measured, and the arithmetic between.

Owns the definitions of the figures; `bench.py` makes the load. Pure, any thread. Times are seconds
of the monotonic clock, published percentiles are milliseconds.
"""

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from heedful_proto.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What load to make; either `num_requests` or `duration_s` ends it."""

    target: str = "127.0.0.1:50051"
    concurrency: int = 1
    num_requests: int | None = None
    """Measured requests; default four for each place of `concurrency`."""
    duration_s: float | None = None
    """Seconds after which no request is started any more."""
    num_warmup: int | None = None
    """Requests before the clock starts; default one for each place of `concurrency`."""
    prompt_tokens: int = 32
    """Length of the random prompts, which differ so that the prefix cache cannot help."""
    text: str | None = None
    """One user message to send instead of random token ids."""
    output_tokens: int = 128
    """Exactly so many tokens are asked for: the end of the sequence is ignored."""
    temperature: float = 0.0
    streaming: bool = True
    model: str = ""
    seed: int = 0
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a list of times, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured; times that need a stream are None for unary calls."""

    config: BenchConfig
    started: datetime
    wall_s: float
    num_ok: int
    errors: dict[str, int]
    """Failed requests by status; they count nowhere else."""
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    """Output tokens over the wall time: prefill, queueing and the ragged end included."""
    total_tokens_per_s: float
    """The same with prompt tokens."""
    decode_tokens_per_s: float | None
    """`concurrency` times the rate of one stream after its first message."""
    ttft_ms: Percentiles | None
    """From sending the request to the first message with a token."""
    inter_message_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    """A message's gap shared evenly by the tokens in it."""
    request_ms: Percentiles | None
    tokens_per_message: float | None
    client_cpu_share: float
    """CPU seconds of this process for each second of wall time."""
    served_by: dict[str, str] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""


@dataclass(slots=True)
class Trace:
    """One request as it was seen: when each message arrived, and how many tokens it held."""

    start_s: float
    end_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    usage: pb.Usage = field(default_factory=pb.Usage)
    served_by: pb.ServedBy = field(default_factory=pb.ServedBy)
    error: str = ""

    def arrivals(self) -> list[tuple[float, int]]:
        """Returns (time, tokens) of each message that held tokens."""
        return [item for item in zip(self.times_s, self.counts, strict=True) if item[1]]


def report(
    config: BenchConfig,
    traces: Sequence[Trace],
    *,
    started: datetime,
    wall_s: float,
    client_cpu_share: float,
) -> BenchReport:
    """Works out the figures of one run."""
    good = [trace for trace in traces if not trace.error]
    streams = [arrivals for trace in good if (arrivals := trace.arrivals())]
    first_s = [trace.arrivals()[0][0] - trace.start_s for trace in good if trace.arrivals()]
    prompt_tokens = sum(trace.usage.prompt_tokens for trace in good)
    output_tokens = sum(trace.usage.completion_tokens for trace in good)
    num_messages = sum(len(arrivals) for arrivals in streams)
    return BenchReport(
        config=config,
        started=started,
        wall_s=wall_s,
        num_ok=len(good),
        errors=dict(Counter(trace.error for trace in traces if trace.error)),
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(trace.usage.cached_prompt_tokens for trace in good),
        output_tokens=output_tokens,
        requests_per_s=len(good) / wall_s,
        output_tokens_per_s=output_tokens / wall_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / wall_s,
        decode_tokens_per_s=_decode_rate(streams, config.concurrency),
        ttft_ms=percentiles_ms(first_s),
        inter_message_ms=percentiles_ms(_message_gaps_s(streams)),
        inter_token_ms=percentiles_ms(_token_gaps_s(streams)),
        request_ms=percentiles_ms([trace.end_s - trace.start_s for trace in good]),
        tokens_per_message=output_tokens / num_messages if num_messages else None,
        client_cpu_share=client_cpu_share,
        served_by=_served_by(good),
        device=_device(),
        versions=_versions(),
        command=" ".join(sys.argv),
    )


def percentiles_ms(times_s: Sequence[float]) -> Percentiles | None:
    """Returns the nearest-rank percentiles of `times_s` in milliseconds, None of an empty list."""
    if not times_s:
        return None
    ordered = sorted(times_s)
    last = len(ordered) - 1
    p50, p90, p99 = (ordered[round(share * last)] * 1e3 for share in (0.5, 0.9, 0.99))
    return Percentiles(sum(ordered) / len(ordered) * 1e3, p50, p90, p99, ordered[last] * 1e3)


def _decode_rate(streams: Sequence[list[tuple[float, int]]], concurrency: int) -> float | None:
    # The first message ends the prefill: its tokens cost no decoding time that could be seen.
    tokens = sum(tokens for arrivals in streams for _, tokens in arrivals[1:])
    decoding_s = sum(arrivals[-1][0] - arrivals[0][0] for arrivals in streams)
    return concurrency * tokens / decoding_s if decoding_s > 0 else None


def _message_gaps_s(streams: Sequence[list[tuple[float, int]]]) -> list[float]:
    return [
        after - before for arrivals in streams for (before, _), (after, _) in pairwise(arrivals)
    ]


def _token_gaps_s(streams: Sequence[list[tuple[float, int]]]) -> list[float]:
    gaps_s: list[float] = []
    for arrivals in streams:
        for (before, _), (after, tokens) in pairwise(arrivals):
            gaps_s.extend([(after - before) / tokens] * tokens)
    return gaps_s


def _served_by(traces: Sequence[Trace]) -> dict[str, str]:
    if not traces:
        return {}
    served_by = traces[0].served_by
    return {
        "base_model": served_by.base_model,
        "policy_version": served_by.policy_version,
        "quantization": served_by.quantization,
    }


def _device() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
    }


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("heedful", "grpcio", "protobuf")}
    return {"python": platform.python_version(), **packages}

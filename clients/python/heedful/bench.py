"""Closed-loop load generator over gRPC.

Owns the load; `bench_report.py` owns the figures, and printing is the command line's. One asyncio
process beside the server on the same cores: a message costs two list appends here, the rest is
worked out at the end. Reads the wire directly, without the client's types and without retries, so
that nothing but gRPC lies between server and clock.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count

import grpc
import grpc.aio
from heedful_proto.v1 import inference_pb2 as pb

from heedful.bench_report import BenchConfig, BenchReport, Percentiles, Trace, report
from heedful.transport import TLS, Metadata, Transport

__all__ = ["BenchConfig", "BenchReport", "Percentiles", "bench", "run_bench"]

_SEED_TEXT = (
    "A model server keeps weights in memory, reads a prompt once, and then writes token by token. "
    "Seven people stood by the river on Tuesday; three of them laughed, and the clock struck 12. "
    "def area(width, height): return width * height  # the unit is the square metre\n"
)


def bench(
    config: BenchConfig, *, api_key: str | None = None, tls: TLS | None = None
) -> BenchReport:
    """Runs the load on an event loop of its own; see `run_bench`."""
    return asyncio.run(run_bench(config, api_key=api_key, tls=tls))


async def run_bench(
    config: BenchConfig, *, api_key: str | None = None, tls: TLS | None = None
) -> BenchReport:
    """Makes the load and returns what the client saw.

    Raises:
        ValueError: the configuration asks for no load, or for two ends.
        HeedfulError: the server cannot be reached, or refused to tokenize.
    """
    _check(config)
    transport = Transport(
        config.target, tls=tls, api_key=api_key, timeout_s=config.timeout_s, max_attempts=4
    )
    try:
        token_pool = await _token_pool(transport, config)
        load = _Load(config, transport, token_pool)
        num_warmup = config.concurrency if config.num_warmup is None else config.num_warmup
        await load.run(iter(range(-num_warmup, 0)), end_s=None)
        started, cpu_s = datetime.now(UTC), time.process_time()
        start_s = time.perf_counter()
        traces = await load.run(_indices(config), end_s=_end_s(config))
        wall_s = time.perf_counter() - start_s
        cpu_share = (time.process_time() - cpu_s) / wall_s
    finally:
        await transport.close()
    return report(config, traces, started=started, wall_s=wall_s, client_cpu_share=cpu_share)


class _Load:
    """The closed loop: `concurrency` workers, each with one request in flight."""

    def __init__(self, config: BenchConfig, transport: Transport, token_pool: list[int]) -> None:
        self._config = config
        self._stub = transport.stubs.inference
        self._metadata: Metadata = transport.metadata
        self._token_pool = token_pool

    async def run(self, indices: Iterator[int], end_s: float | None) -> list[Trace]:
        traces: list[Trace] = []

        async def work() -> None:
            for request_idx in indices:
                if end_s is not None and time.perf_counter() >= end_s:
                    return
                traces.append(await self._one(request_idx))

        await asyncio.gather(*(work() for _ in range(self._config.concurrency)))
        return traces

    async def _one(self, request_idx: int) -> Trace:
        request = _request(self._config, self._token_pool, request_idx)
        trace = Trace(start_s=time.perf_counter())
        try:
            if self._config.streaming:
                await self._stream(request, trace)
            else:
                await self._unary(request, trace)
        except grpc.aio.AioRpcError as error:
            trace.error = error.code().name
        trace.end_s = time.perf_counter()
        return trace

    async def _stream(self, request: pb.GenerateRequest, trace: Trace) -> None:
        clock, times_s, counts = time.perf_counter, trace.times_s, trace.counts
        message = pb.GenerateStreamResponse()
        async for message in self._stub.GenerateStream(
            pb.GenerateStreamRequest(request=request),
            timeout=self._config.timeout_s,
            metadata=self._metadata,
        ):
            times_s.append(clock())
            counts.append(len(message.delta.token_ids))
            if message.HasField("head"):
                trace.served_by = message.head.served_by
        trace.usage = message.delta.usage

    async def _unary(self, request: pb.GenerateRequest, trace: Trace) -> None:
        response = await self._stub.Generate(
            request, timeout=self._config.timeout_s, metadata=self._metadata
        )
        trace.served_by, trace.usage = response.served_by, response.usage


def _check(config: BenchConfig) -> None:
    if config.num_requests is not None and config.duration_s is not None:
        raise ValueError("give either a number of requests or a duration, not both")
    asked = (config.concurrency, config.output_tokens, config.prompt_tokens)
    ends = (config.num_requests, config.duration_s)
    if min(asked) < 1 or any(end is not None and end <= 0 for end in ends):
        raise ValueError("concurrency, requests, duration and lengths must be positive")


def _indices(config: BenchConfig) -> Iterator[int]:
    if config.duration_s is not None:
        return count()
    return iter(range(config.num_requests or 4 * config.concurrency))


def _end_s(config: BenchConfig) -> float | None:
    return None if config.duration_s is None else time.perf_counter() + config.duration_s


async def _token_pool(transport: Transport, config: BenchConfig) -> list[int]:
    if config.text is not None:
        return []
    # Ids of a text are valid and ordinary for any vocabulary, whose size a client cannot know.
    response = await transport.unary(
        transport.stubs.inference.Tokenize,
        pb.TokenizeRequest(model=config.model, text=_SEED_TEXT),
        deadline=transport.deadline(None),
        repeatable=True,
    )
    return sorted(set(response.token_ids))


def _request(config: BenchConfig, token_pool: list[int], request_idx: int) -> pb.GenerateRequest:
    request = pb.GenerateRequest(model=config.model)
    if config.text is not None:
        request.prompt.chat.messages.add(role="user", content=config.text)
    else:
        chooser = random.Random(f"{config.seed}/{request_idx}")
        request.prompt.token_ids.ids.extend(chooser.choices(token_pool, k=config.prompt_tokens))
    request.sampling.temperature = config.temperature
    request.sampling.seed = config.seed
    request.sampling.max_tokens = config.output_tokens
    request.sampling.ignore_eos = True
    return request

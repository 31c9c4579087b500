"""One generation in flight: the parts of its completions as they arrive.

Owns collecting and coalescing, the admitted sequences and the metrics of one request, and that an
end is not handed out before its log entry is durable. It knows nothing of protobuf or gRPC and
nothing of how tokens are computed. Made by generator.py; runs on the event loop.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self

from heedful_server.deployment.observing import Record
from heedful_server.engine_client.stream import EngineStream
from heedful_server.errors import EngineRequestError, EngineUnavailable, HeedfulServerError
from heedful_server.feedback.completion_log import LogEntry
from heedful_server.metrics import Metrics
from heedful_server.protocol import Delta, Finish
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.parts import Part, Served
from heedful_server.rpc.requests import GenerationRequest

Choose = Callable[[list[Part]], Awaitable[list[Part]]]


class Generation:
    """One request in flight; leaving its context frees what it holds, in the engine too."""

    def __init__(
        self,
        request: GenerationRequest,
        served: Served,
        completion_ids: tuple[str, ...],
        entry: LogEntry,
        stream: EngineStream,
        admission: Admission,
        metrics: Metrics,
        received_at_s: float,
        record: Record,
        on_end: Callable[["Generation"], None],
    ) -> None:
        self.request = request
        self.served = served
        self.completion_ids = completion_ids
        self.entry = entry
        self._stream = stream
        self._admission = admission
        self._metrics = metrics
        self._received_at_s = received_at_s
        self._record = record
        self._on_end = on_end
        self._last_token_at_s: dict[int, float] = {}
        self._urgent = False
        self._num_unfinished = request.num_samples
        self.num_tokens = 0  # generated so far, of all completions

    @property
    def finished(self) -> bool:
        """Whether the end of every completion was returned."""
        return self._num_unfinished == 0

    async def collect(self, choose: Choose | None = None) -> list[Part]:
        """Wait for all completions and return them by index, or those that `choose` keeps.

        The others were nobody's answer, and leave no row in the log.

        Raises:
            EngineUnavailable: the engine died.
            EngineRequestError: the engine refused or failed this request.
        """
        parts = [Part(index) for index in range(self.request.num_samples)]
        while not self.finished:
            for delta in await self._next():
                parts[delta.index].add(delta)
        if choose is not None:
            parts = await choose(parts)
            self.entry.keep_only(part.index for part in parts)
        await self._log_ends(parts)
        return parts

    async def next_parts(self, flush_at_s: float) -> list[Part]:
        """Return what is new, one part a completion; raises as collect does.

        First tokens and ends are returned at once; others gather until flush_at_s (monotonic).
        """
        parts: dict[int, Part] = {}
        while True:
            try:
                # asyncio's clock is the monotonic clock.
                async with asyncio.timeout_at(flush_at_s if parts else None):
                    deltas = await self._next()
            except TimeoutError:
                return list(parts.values())
            for delta in deltas:
                parts.setdefault(delta.index, Part(delta.index)).add(delta)
            if self._urgent or time.monotonic() >= flush_at_s:
                await self._log_ends(parts.values())
                return list(parts.values())

    def cancel(self) -> None:
        """Ask the engine to end what is unfinished; the ends still arrive."""
        self._stream.cancel("cancelled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._on_end(self)
        self.entry.cut("error" if isinstance(error, HeedfulServerError) else "cancelled")
        if self._num_unfinished:
            if isinstance(error, EngineRequestError | EngineUnavailable):
                self._record.failed()
            self._metrics.request_success.labels("cancelled").inc(self._num_unfinished)
            self._admission.release(self._num_unfinished, self.request.priority)
            self._num_unfinished = 0

    async def _next(self) -> list[Delta]:
        deltas = await self._stream.next()
        now_s = time.monotonic()
        self._urgent = False
        num_tokens: dict[int, int] = {}
        for delta in deltas:
            self.entry.add(delta)
            self.num_tokens += len(delta.token_ids)
            num_tokens[delta.index] = num_tokens.get(delta.index, 0) + len(delta.token_ids)
            if delta.finish is not None:
                self._observe_finish(delta.finish, now_s)
        for index, count in num_tokens.items():
            self._observe_tokens(index, count, now_s)
        return deltas

    async def _log_ends(self, parts: Iterable[Part]) -> None:
        """Make the ends among the parts durable; says in each whether it can be rated."""
        ends = [part for part in parts if part.finish is not None]
        written = await asyncio.gather(*(self.entry.write(part.index) for part in ends))
        for part, is_logged in zip(ends, written, strict=True):
            part.rateable = is_logged

    def _observe_tokens(self, index: int, count: int, now_s: float) -> None:
        if count == 0:
            return
        last_s = self._last_token_at_s.get(index)
        self._last_token_at_s[index] = now_s
        if last_s is None:
            self._urgent = True
            if len(self._last_token_at_s) == 1:
                self._metrics.time_to_first_token.observe(now_s - self._received_at_s)
            return
        for _ in range(count):
            self._metrics.inter_token_latency.observe((now_s - last_s) / count)

    def _observe_finish(self, finish: Finish, now_s: float) -> None:
        self._urgent = True
        self._num_unfinished -= 1
        self._admission.release(1, self.request.priority)
        self._metrics.observe_finish(finish)
        self._record.ended(finish.completion_tokens, finish.decode_s)
        if self._num_unfinished == 0:
            self._metrics.e2e_request_latency.observe(now_s - self._received_at_s)

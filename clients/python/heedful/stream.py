"""One streamed generation: deltas as they arrive, and the whole of it so far at any time.

Owns the state of one stream on the event loop of its client; `sync.py` bridges it to threads. Once
the head has arrived the generation has begun, and nothing is tried again.
"""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeAlias

import grpc
import grpc.aio
from heedful_proto.v1 import inference_pb2 as pb

from heedful.errors import ServerFault, error_from_rpc
from heedful.replies import (
    finish_reason_from_wire,
    logprobs_from_wire,
    served_by_from_wire,
    usage_from_wire,
)
from heedful.transport import Deadline, Transport
from heedful.types import (
    Completion,
    Delta,
    FinishReason,
    Generation,
    ServedBy,
    TokenLogprob,
    Usage,
)

StreamCall: TypeAlias = grpc.aio.UnaryStreamCall[
    pb.GenerateStreamRequest, pb.GenerateStreamResponse
]


class _Parts:
    """What has arrived of one completion."""

    def __init__(self, head: pb.CompletionHead) -> None:
        self.head = head
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop = ""
        self.usage = Usage()
        self.rateable = head.rateable

    def add(self, delta: Delta, wire: pb.CompletionDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason
        self.stop = delta.stop
        self.usage = delta.usage or self.usage
        if wire.HasField("rateable"):
            self.rateable = wire.rateable

    def completion(self, cancelled: bool) -> Completion:
        unfinished = FinishReason.CANCELLED if cancelled else None
        return Completion(
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            index=self.head.index,
            completion_id=self.head.completion_id,
            completion_token=self.head.completion_token,
            rateable=self.rateable,
            finish_reason=self.finish_reason or unfinished,
            stop=self.stop,
            logprobs=tuple(self.logprobs),
            usage=self.usage,
        )


class AsyncGenerationStream:
    """Deltas of one generation; leaving the loop early, or the `async with` block, cancels it."""

    def __init__(
        self, transport: Transport, request: pb.GenerateRequest, deadline: Deadline
    ) -> None:
        self._transport = transport
        self._request = pb.GenerateStreamRequest(request=request)
        self._deadline = deadline
        self._call: StreamCall | None = None
        self._served_by: ServedBy | None = None
        self._parts: dict[int, _Parts] = {}
        self._cancelled = False
        self._ended = False

    async def head(self) -> ServedBy:
        """Waits until the generation has begun and returns what answers.

        Raises:
            HeedfulError: it could not begin.
        """
        if self._served_by is None:
            first = await self._transport.attempts(
                self._open, deadline=self._deadline, repeatable=True
            )
            self._served_by = served_by_from_wire(first.head.served_by)
            self._parts = {item.index: _Parts(item) for item in first.head.completions}
        return self._served_by

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while (delta := await self.next()) is not None:
                yield delta
        finally:
            self.cancel()

    async def texts(self) -> AsyncIterator[str]:
        """Yields pieces of the first completion's text as they arrive."""
        try:
            while (delta := await self.next()) is not None:
                if delta.index == 0 and delta.text:
                    yield delta.text
        finally:
            self.cancel()

    async def next(self) -> Delta | None:
        """Returns the next delta, None at the end or after `cancel`.

        Raises:
            HeedfulError: the generation failed; `generation` holds what had arrived.
        """
        if self._ended:
            return None
        await self.head()
        assert self._call is not None
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._ended = True
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            # gRPC reports our own cancel() to the read that waits as if this task were cancelled.
            task = asyncio.current_task()
            if self._cancelled and task is not None and not task.cancelling():
                return None
            self.cancel()
            raise
        if not isinstance(message, pb.GenerateStreamResponse):
            self._ended = True
            return None
        return self._take(message.delta)

    @property
    def generation(self) -> Generation:
        """Everything that has arrived so far; complete once the iteration has ended.

        Raises:
            RuntimeError: nothing has arrived yet.
        """
        if self._served_by is None:
            raise RuntimeError("the stream has not begun: await head() or iterate first")
        parts = (self._parts[index] for index in sorted(self._parts))
        completions = tuple(part.completion(self._cancelled) for part in parts)
        usage = Usage(
            prompt_tokens=max(item.usage.prompt_tokens for item in completions),
            cached_prompt_tokens=max(item.usage.cached_prompt_tokens for item in completions),
            completion_tokens=sum(len(item.token_ids) for item in completions),
        )
        return Generation(completions, self._served_by, usage)

    def cancel(self) -> None:
        """Ends the generation; no effect once it has ended. Must run on the client's event loop."""
        if self._ended:
            return
        self._ended = True
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _open(self) -> pb.GenerateStreamResponse:
        self._call = self._transport.stubs.inference.GenerateStream(
            self._request,
            timeout=self._deadline.remaining_s(),
            metadata=self._transport.metadata,
        )
        first = await self._call.read()
        if not isinstance(first, pb.GenerateStreamResponse):
            raise ServerFault("the server ended the stream before its first message")
        return first

    def _take(self, wire: pb.CompletionDelta) -> Delta:
        delta = Delta(
            index=wire.index,
            text=wire.text,
            token_ids=tuple(wire.token_ids),
            logprobs=logprobs_from_wire(wire.logprobs),
            finish_reason=finish_reason_from_wire(wire.finish_reason),
            stop=wire.stop,
            usage=usage_from_wire(wire.usage) if wire.HasField("usage") else None,
        )
        self._parts[delta.index].add(delta, wire)
        return delta

"""One request's view of the engine: the deltas of its n completions, as they arrive.

Owns the buffer between the socket reader and the request's handler. It is unbounded in name only:
a request samples at most n * max_tokens tokens. Runs on the server's event loop; knows nothing of
gRPC.
"""

import asyncio
from collections.abc import Callable

from heedful_server.errors import HeedfulServerError
from heedful_server.protocol import Delta, FinishReason


class EngineStream:
    """The deltas of one submitted request; made by EngineClient.submit."""

    def __init__(
        self,
        request_id: str,
        n: int,
        send_cancel: Callable[[FinishReason], None],
        forget: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self._num_unfinished = n
        self._send_cancel = send_cancel
        self._forget = forget
        self._buffer: list[Delta] = []
        self._error: HeedfulServerError | None = None
        self._wake = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether the last delta of every completion has arrived (it may not be read yet)."""
        return self._num_unfinished == 0

    async def next(self) -> list[Delta]:
        """Wait for at least one delta and return all that have arrived.

        Raises:
            StopAsyncIteration: after the last delta of every completion was returned.
            EngineUnavailable: the child died with this request in flight.
            EngineRequestError: the engine refused or failed this request.
        """
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self.finished:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        deltas, self._buffer = self._buffer, []
        return deltas

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """Ask the engine to end every unfinished completion; their last deltas still arrive."""
        if not self.finished and self._error is None:
            self._send_cancel(reason)

    def close(self) -> None:
        """Forget the stream, cancelling what is unfinished."""
        self.cancel()
        self._forget()

    def push(self, delta: Delta) -> None:
        """Take a delta from the socket reader."""
        self._buffer.append(delta)
        if delta.finish is not None:
            self._num_unfinished -= 1
        self._wake.set()

    def fail(self, error: HeedfulServerError) -> None:
        """End the stream with an error; deltas that arrived before it can still be read."""
        self._error = error
        self._wake.set()

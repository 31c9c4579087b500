"""A stream that is watched for a long time: opened again where it breaks.

Owns that rule and its patience; knows nothing of what the messages mean. Lives on the event loop of
its client.
"""

from collections.abc import AsyncGenerator, Callable
from typing import TypeVar, cast

import grpc
import grpc.aio

from heedful.errors import HeedfulError, Unavailable, error_from_rpc
from heedful.transport import Deadline, Transport

Q = TypeVar("Q")
R = TypeVar("R")

RECONNECT_S = 60.0
"""Seconds to wait for a server that went away."""


async def reopened(
    transport: Transport,
    open_stream: Callable[[], grpc.aio.UnaryStreamCall[Q, R]],
    deadline: Deadline,
) -> AsyncGenerator[R | None, None]:
    """Yields the messages of a stream, opening it again where it breaks, and None at its end.

    A caller that goes on after None opens it again, as after a server that drained.

    Raises:
        HeedfulError: a failure that no reconnection mends, or the server stayed away.
    """
    patience = Deadline(RECONNECT_S)
    while True:
        call: grpc.aio.UnaryStreamCall[Q, R] | None = None
        try:
            call, message = await _begin(transport, open_stream, deadline)
            while message is not None:
                patience = Deadline(RECONNECT_S)
                yield message
                message = await _read(call)
            yield None
        except grpc.aio.AioRpcError as error:
            _unless_patient(error_from_rpc(error), patience)
        except Unavailable as error:
            _unless_patient(error, patience)
        finally:
            if call is not None:
                call.cancel()
        await transport.pause(deadline)


async def _begin(
    transport: Transport,
    open_stream: Callable[[], grpc.aio.UnaryStreamCall[Q, R]],
    deadline: Deadline,
) -> tuple[grpc.aio.UnaryStreamCall[Q, R], R | None]:
    async def attempt() -> tuple[grpc.aio.UnaryStreamCall[Q, R], R | None]:
        call = open_stream()
        return call, await _read(call)

    return await transport.attempts(attempt, deadline=deadline, repeatable=True)


async def _read(call: grpc.aio.UnaryStreamCall[Q, R]) -> R | None:
    message: object = await call.read()
    return None if message is grpc.aio.EOF else cast(R, message)


def _unless_patient(error: HeedfulError, patience: Deadline) -> None:
    if not isinstance(error, Unavailable) or not patience.allows(0.0):
        raise error from None

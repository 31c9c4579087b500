"""One gRPC channel with its stubs, deadlines and retries.

Owns the connection and the rule below; knows nothing of what the messages mean. Lives on one event
loop: the channel opens with the first call and belongs to the loop that made it.

A generation is tried again only where it cannot have begun; a pure call (score, tokenize, health)
can be repeated, and so can a judgement, which its id tells from another. Always inside the caller's
deadline, with jitter:

    what happened                        generate    stream             pure calls, feedback
    no connection                        retried     retried            retried
    RESOURCE_EXHAUSTED with RetryInfo    retried     before its head    retried
    UNAVAILABLE with RetryInfo           retried     before its head    retried
    UNAVAILABLE, reason DRAINING         retried     before its head    retried
    UNAVAILABLE otherwise                raised      before its head    retried
    DEADLINE_EXCEEDED of one attempt     raised      raised             retried
    any other status                     raised      raised             raised

A rollout leaves no trace on the server, so it counts as a pure call. Feedback limits each attempt
besides the whole call, so that a lost answer leaves time for another.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from heedful_proto.v1 import feedback_pb2_grpc, inference_pb2_grpc, models_pb2_grpc

from heedful.errors import (
    DeadlineExceeded,
    HeedfulError,
    NotConnected,
    QueueFull,
    Unavailable,
    error_from_rpc,
)

Q = TypeVar("Q")
R = TypeVar("R")
Metadata: TypeAlias = tuple[tuple[str, str], ...]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DRAINING_REASON = "DRAINING"
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
# A quarter to half a second: streams are opened again for as long as their reader is patient.
_REOPEN_BACKOFF = 2
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # gRPC's own delays start at a second and grow to two minutes: too slow to meet a new server.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM bytes of an encrypted connection; key and certificate are for mutual TLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None

    @classmethod
    def from_files(
        cls, ca: Path | None = None, key: Path | None = None, certificate: Path | None = None
    ) -> "TLS":
        """Reads PEM files; without `ca` the roots that come with gRPC are trusted."""
        return cls(
            root_certificates=ca.read_bytes() if ca else None,
            private_key=key.read_bytes() if key else None,
            certificate_chain=certificate.read_bytes() if certificate else None,
        )


class Deadline:
    """The moment at which a call with all its retries must be over."""

    def __init__(self, timeout_s: float) -> None:
        self._end_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Returns the seconds left, None where there is no limit.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        if self._end_s == math.inf:
            return None
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the timeout of the call passed")
        return left_s

    def allows(self, delay_s: float) -> bool:
        """Whether anything is left after waiting `delay_s`."""
        return time.monotonic() + delay_s < self._end_s


@dataclass(frozen=True, slots=True)
class Stubs:
    """A channel and the services on it."""

    channel: grpc.aio.Channel
    # The generated stubs name their asynchronous form in the type stubs only, hence the quotes.
    inference: "inference_pb2_grpc.InferenceServiceAsyncStub"
    feedback: "feedback_pb2_grpc.FeedbackServiceAsyncStub"
    models: "models_pb2_grpc.ModelServiceAsyncStub"
    health: health_pb2_grpc.HealthStub


def open_stubs(target: str, tls: TLS | None) -> Stubs:
    """Opens a channel; must run on the event loop that will use it."""
    if tls is None:
        channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    else:
        credentials = grpc.ssl_channel_credentials(
            tls.root_certificates, tls.private_key, tls.certificate_chain
        )
        channel = grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
    return Stubs(
        channel=channel,
        inference=inference_pb2_grpc.InferenceServiceStub(channel),
        feedback=feedback_pb2_grpc.FeedbackServiceStub(channel),
        models=models_pb2_grpc.ModelServiceStub(channel),
        health=health_pb2_grpc.HealthStub(channel),
    )


def retry_delay_s(
    error: HeedfulError, attempt_idx: int, repeatable: bool, attempts_are_limited: bool = False
) -> float | None:
    """Returns the seconds to wait before the next attempt, None where there must be none."""
    told_s = error.retry_after_s
    if told_s is not None and isinstance(error, QueueFull | Unavailable):
        return told_s * random.uniform(1.0, 1.25)
    if isinstance(error, Unavailable) and (
        repeatable or isinstance(error, NotConnected) or error.reason == DRAINING_REASON
    ):
        return _backoff_s(attempt_idx)
    if isinstance(error, DeadlineExceeded) and repeatable and attempts_are_limited:
        return _backoff_s(attempt_idx)
    return None


def _backoff_s(attempt_idx: int) -> float:
    ceiling_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt_idx)
    return random.uniform(ceiling_s / 2, ceiling_s)


class Transport:
    """A lazily opened channel to one target, and the attempts of each call on it."""

    def __init__(
        self,
        target: str,
        *,
        tls: TLS | None,
        api_key: str | None,
        timeout_s: float,
        max_attempts: int,
    ) -> None:
        self.target = target
        self.metadata: Metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._tls = tls
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._stubs: Stubs | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def stubs(self) -> Stubs:
        """The services on this channel, opened when they are first asked for.

        Raises:
            RuntimeError: the client is closed, or used on another event loop than before.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._stubs is None:
            self._loop = loop
            self._stubs = open_stubs(self.target, self._tls)
        if self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to the event loop that first used it")
        return self._stubs

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Starts the clock of one call; None means the client's default."""
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        deadline: Deadline,
        repeatable: bool,
        attempt_timeout_s: float | None = None,
    ) -> R:
        """Calls `method` until it succeeds or must not be tried again.

        Args:
            method: what to call.
            request: sent unchanged with every attempt.
            deadline: for all attempts together.
            repeatable: whether doing it twice is the same as doing it once.
            attempt_timeout_s: seconds for each attempt; None for no limit but the deadline.

        Raises:
            HeedfulError: the last attempt's failure.
        """

        async def attempt() -> R:
            timeout_s = deadline.remaining_s()
            if attempt_timeout_s is not None:
                timeout_s = min(attempt_timeout_s, math.inf if timeout_s is None else timeout_s)
            return await method(request, timeout=timeout_s, metadata=self.metadata)

        return await self.attempts(
            attempt,
            deadline=deadline,
            repeatable=repeatable,
            attempts_are_limited=attempt_timeout_s is not None,
        )

    async def attempts(
        self,
        attempt: Callable[[], Awaitable[R]],
        *,
        deadline: Deadline,
        repeatable: bool,
        attempts_are_limited: bool = False,
    ) -> R:
        """Runs `attempt` on a live connection by the rule of this module.

        Raises:
            HeedfulError: the last attempt's failure.
        """
        attempt_idx = 0
        while True:
            try:
                await self._connect(deadline)
                return await attempt()
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
            except NotConnected as not_connected:
                error = not_connected
            delay_s = retry_delay_s(error, attempt_idx, repeatable, attempts_are_limited)
            attempt_idx += 1
            if delay_s is None or attempt_idx >= self._max_attempts or not deadline.allows(delay_s):
                raise error from None
            await asyncio.sleep(delay_s)

    async def pause(self, deadline: Deadline) -> None:
        """Waits a little before a stream that ended is opened again.

        Raises:
            DeadlineExceeded: nothing is left after that.
        """
        delay_s = _backoff_s(_REOPEN_BACKOFF)
        if not deadline.allows(delay_s):
            raise DeadlineExceeded("the timeout of the call passed")
        await asyncio.sleep(delay_s)

    async def close(self) -> None:
        """Closes the channel; calls in flight end as cancelled."""
        self._closed = True
        if self._stubs is not None:
            await self._stubs.channel.close()

    async def _connect(self, deadline: Deadline) -> None:
        # A request is handed over on a live connection only, so that a failure to connect can be
        # told from a connection that broke after the server may have begun.
        channel = self.stubs.channel
        while (
            state := channel.get_state(try_to_connect=True)
        ) is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise NotConnected(f"no server answers at {self.target}")
            change = channel.wait_for_state_change(state)
            try:
                await asyncio.wait_for(change, deadline.remaining_s())
            except TimeoutError:
                raise DeadlineExceeded(f"{self.target} did not answer in time") from None

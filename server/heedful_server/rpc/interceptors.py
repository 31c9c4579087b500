"""The one interceptor around every call of our services.

Owns what all calls share: the request id, the deadline, the caller and the scope of the method,
refusing while the server drains, counting what is in flight, turning exceptions into statuses, the
patience with slow readers, metrics. It knows nothing of what messages say. Health and reflection
pass by it, so that they answer to the end and to everybody. Runs on the event loop.

A handler that swallows CancelledError leaks memory in grpc, so it is always raised again. Streams
are async generators here: the interceptor writes their messages, and closes them however they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Never, TypeAlias, cast

import grpc
import grpc.aio
import structlog
from heedful_store.ids import uuid7
from prometheus_client import Counter

from heedful_server.errors import ClientTooSlow, Draining
from heedful_server.identity import GENERATE
from heedful_server.metrics import Metrics
from heedful_server.rpc.call import Call, current_call, current_caller
from heedful_server.rpc.status import DETAILS_KEY, RpcError, to_rpc_error
from heedful_server.security.keyring import Keyring
from heedful_server.security.method_scopes import METHOD_SCOPES
from heedful_server.security.quota import Quota

log = structlog.get_logger(__name__)

REQUEST_ID_KEY = "x-request-id"
OUR_PACKAGE = "/heedful."
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncGenerator[Any, None]]
# Quoted, because grpc's own classes are generic in their type stubs only.
MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[MethodHandler | None]]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our services."""

    def __init__(
        self, metrics: Metrics, keyring: Keyring, requests: Quota, write_timeout_s: float
    ) -> None:
        self._metrics = metrics
        self._keyring = keyring
        self._requests = requests
        self._write_timeout_s = write_timeout_s
        # Wrapped once for each method that exists, not once for each call.
        self._handlers: dict[str, MethodHandler] = {}
        # Looking a child up by its labels costs more than counting.
        self._handled: dict[tuple[str, str], Counter] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_in_flight = 0
        self.draining = False

    async def wait_idle(self, timeout_s: float, hurry: asyncio.Event) -> bool:
        """Wait until no call is in flight, at most timeout_s and not once `hurry` is set.

        Returns whether no call is in flight.
        """
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self._idle.is_set()

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> MethodHandler | None:
        """Return the handler of a method, wrapped where the method is ours."""
        method: str = details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(details)
        if handler is None or not method.startswith(OUR_PACKAGE):
            return handler
        self._handlers[method] = self._wrap(method, handler)
        return self._handlers[method]

    def _wrap(self, method: str, handler: MethodHandler) -> MethodHandler:
        assert not handler.request_streaming, "the contract has no client streams"
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            # grpc's types know handlers of the synchronous server only.
            stream = cast(Stream, handler.unary_stream)
            guarded: Any = self._guard(method, self._write_all(stream))
            return grpc.unary_stream_rpc_method_handler(guarded, *serializers)
        guarded = self._guard(method, cast(Handler, handler.unary_unary))
        return grpc.unary_unary_rpc_method_handler(guarded, *serializers)

    def _write_all(self, stream: Stream) -> Handler:
        """Turn a generator of messages into a handler that writes them."""

        async def handle(request: Any, context: Context) -> None:
            async with contextlib.aclosing(stream(request, context)) as messages:
                async for message in messages:
                    try:
                        async with asyncio.timeout(self._write_timeout_s):
                            await context.write(message)
                    except TimeoutError:
                        raise ClientTooSlow(
                            f"a message was not read within {self._write_timeout_s:g} s"
                        ) from None

        return handle

    def _guard(self, method: str, inner: Handler) -> Handler:
        """Add to a handler what every call of ours has."""
        scope = METHOD_SCOPES[method]

        async def handle(request: Any, context: Context) -> Any:
            call = self._begin(method, context)
            code = grpc.StatusCode.OK
            try:
                if self.draining:
                    raise Draining("the server is shutting down")
                await self._admit(scope, context)
                return await inner(request, context)
            except asyncio.CancelledError:
                code = _code_of_cancelled(call)
                raise
            except grpc.aio.BaseError:
                # A write found that the caller has left.
                code = grpc.StatusCode.CANCELLED
                raise asyncio.CancelledError from None
            except Exception as error:
                failure = self._record(error, call)
                code = failure.code
            finally:
                self._end(method, code)
            # The call counts as ended already: behind a reader that has stalled its status waits.
            return await _abort(context, failure, call)

        return handle

    async def _admit(self, scope: str, context: Context) -> None:
        """Find out who calls and whether they may.

        Raises:
            Unauthenticated, PermissionDenied: they may not.
            QuotaExceeded: they may, but not now.
        """
        who = await self._keyring.caller_of(context.invocation_metadata() or ())
        if scope:
            who.require(*scope.split(" or "))
        if scope == GENERATE:
            self._requests.take(who.tenant)
        current_caller.set(who)

    def _record(self, error: Exception, call: Call) -> RpcError:
        failure = to_rpc_error(error, call.request_id)
        self._metrics.rejects.labels(failure.reason.lower()).inc()
        if failure.code is grpc.StatusCode.INTERNAL:
            log.error("call failed", method=call.method, request_id=call.request_id, exc_info=error)
        return failure

    def _begin(self, method: str, context: Context) -> Call:
        now_s = time.monotonic()
        remaining_s = context.time_remaining()
        call = Call(
            method=method,
            request_id=_request_id(context),
            received_at_s=now_s,
            deadline_at_s=None if remaining_s is None else now_s + remaining_s,
        )
        current_call.set(call)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        self._metrics.rpc_started.labels(method).inc()
        self.num_in_flight += 1
        self._idle.clear()
        return call

    def _end(self, method: str, code: grpc.StatusCode) -> None:
        labels = (method, code.name)
        if labels not in self._handled:
            self._handled[labels] = self._metrics.rpc_handled.labels(*labels)
        self._handled[labels].inc()
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()


async def _abort(context: Context, failure: RpcError, call: Call) -> Never:
    metadata = ((REQUEST_ID_KEY, call.request_id), (DETAILS_KEY, failure.details))
    try:
        await context.abort(failure.code, failure.message, metadata)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:
        # The caller left before it could be told.
        raise asyncio.CancelledError from None


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid7()


def _code_of_cancelled(call: Call) -> grpc.StatusCode:
    if call.deadline_at_s is not None and time.monotonic() >= call.deadline_at_s:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED

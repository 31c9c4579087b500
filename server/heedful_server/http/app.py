"""The HTTP port: metrics and health, in the event loop of the gRPC server.

Owns the routes that operators use and the embedded HTTP server. Further doors (OpenAI routes, the
web page) are modules of their own that hand their routes to make_app. It decides nothing about
readiness.
"""

import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Generator, Sequence

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from heedful_server.errors import PermissionDenied, Unauthenticated

_SHUTDOWN_TIMEOUT_S = 2


def make_app(
    registry: CollectorRegistry,
    not_ready_reason: Callable[[], str],
    routes: Sequence[BaseRoute] = (),
    admit_metrics: Callable[[Request], Awaitable[None]] | None = None,
) -> Starlette:
    """Return the application.

    Args:
        registry: what `/metrics` shows.
        not_ready_reason: why the server cannot generate now; empty when it can.
        routes: the routes of further doors.
        admit_metrics: raises Unauthenticated or PermissionDenied for who may not see `/metrics`;
            None lets everybody.
    """

    async def metrics(request: Request) -> Response:
        if admit_metrics is not None:
            try:
                await admit_metrics(request)
            except Unauthenticated as error:
                challenge = {"www-authenticate": "Bearer"}
                return PlainTextResponse(f"{error}\n", 401, challenge)
            except PermissionDenied as error:
                return PlainTextResponse(f"{error}\n", 403)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        reason = not_ready_reason()
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    own = [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    return Starlette(routes=[*own, *routes])


class HttpServer(uvicorn.Server):
    """Serves an application on a socket that its owner has bound."""

    def __init__(
        self, app: Starlette, sock: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        """Serve in the clear, or encrypted with a context that its owner keeps up to date."""
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
        )
        # Loading would replace the context with none.
        config.load()
        config.ssl = tls
        super().__init__(config)
        self._sock = sock

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the process's owner, who drains before it stops this server."""
        yield

    async def run_until_stopped(self) -> None:
        """Serve until stop is called."""
        await self.serve(sockets=[self._sock])

    def stop(self) -> None:
        """End open connections and the server."""
        self.should_exit = True

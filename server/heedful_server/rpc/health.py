"""grpc.health.v1: whether each service can answer now, asked once or watched.

Owns the status of each service and who watches it; what decides the status is readiness.py. The
stock servicer loses watchers of a service when another one of them leaves, hence this one. Runs
on the event loop.
"""
# ruff: noqa: N802 - the contract names the methods

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # untyped package
    """Health of every service of this server; "" is the server as a whole."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set_serving(self, service: str, serving: bool) -> None:
        """Set a service's status and tell those who watch it."""
        status = _SERVING if serving else _NOT_SERVING
        if self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return a service's status; NOT_FOUND where there is no such service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Return a service's status now and whenever it changes."""
        last_status = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != last_status:
                yield health_pb2.HealthCheckResponse(status=status)
                last_status = status
            await changed.wait()

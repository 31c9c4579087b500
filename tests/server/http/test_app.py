"""The HTTP port: health, readiness, metrics, further routes, the embedded server."""

import asyncio
import socket
import threading

import httpx
import pytest
from heedful_server.http.app import HttpServer, make_app
from heedful_server.metrics import Metrics
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


class Door:
    """What the application asks about readiness."""

    reason = ""


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def app(metrics: Metrics, door: Door):
    async def extra(_: Request) -> Response:
        return PlainTextResponse("more")

    return make_app(metrics.registry, lambda: door.reason, [Route("/v1/extra", extra)])


@pytest.fixture
async def client(app):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_alive_whatever_the_engine_does(client, door):
    door.reason = "the engine is loading"
    assert (await client.get("/healthz")).status_code == 200


async def test_ready_only_without_a_reason_against_it(client, door):
    reply = await client.get("/readyz")
    assert (reply.status_code, reply.text) == (200, "ready\n")
    door.reason = "the engine is loading: weights (25%)"
    reply = await client.get("/readyz")
    assert (reply.status_code, reply.text) == (503, "the engine is loading: weights (25%)\n")


async def test_metrics_are_prometheus_text(client):
    reply = await client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert "heedful_engine_up 0.0" in reply.text


async def test_metrics_follow_the_accepted_format(client):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    reply = await client.get("/metrics", headers=accept)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


async def test_further_doors_bring_their_routes(client):
    assert (await client.get("/v1/extra")).text == "more"
    assert (await client.get("/v1/none")).status_code == 404
    assert (await client.post("/healthz")).status_code == 405


async def test_embedded_server_serves_and_stops(app):
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    server = HttpServer(app, sock)
    running = asyncio.create_task(server.run_until_stopped())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/healthz")).text == "ok\n"
    server.stop()
    await asyncio.wait_for(running, 5)


async def test_embedded_server_leaves_signals_alone(app):
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    server = HttpServer(app, socket.create_server(("127.0.0.1", 0)))
    running = asyncio.create_task(server.run_until_stopped())
    await asyncio.sleep(0.05)
    assert threading.current_thread() is threading.main_thread()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    server.stop()
    await asyncio.wait_for(running, 5)

"""Health, readiness and reflection."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from heedful_server.config import load_config
from heedful_server.engine_client.client import EngineState

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
INFERENCE = "heedful.v1.InferenceService"


@pytest.fixture
def health(channel):
    return health_pb2_grpc.HealthStub(channel)


async def check(health, service: str) -> int:
    return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status


async def next_status(watch) -> int:
    return (await asyncio.wait_for(watch.read(), 5)).status


async def test_each_service_has_its_status(health):
    assert await check(health, "") == SERVING
    assert await check(health, INFERENCE) == SERVING
    assert await check(health, "heedful.v1.ModelService") == SERVING
    assert await check(health, "heedful.v1.FeedbackService") == SERVING


async def test_unknown_service_is_not_found(health):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(health, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_of_an_unknown_service_says_unknown(health):
    watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
    assert await next_status(watch) == UNKNOWN
    watch.cancel()


async def test_watch_follows_the_engine(health, engine):
    watch = health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert await next_status(watch) == SERVING
    engine.become(EngineState.RESTARTING)
    assert await next_status(watch) == NOT_SERVING
    engine.become(EngineState.READY)
    assert await next_status(watch) == SERVING
    watch.cancel()


async def test_watcher_stays_when_another_one_leaves(health, engine):
    request = health_pb2.HealthCheckRequest(service=INFERENCE)
    leaver, stayer = health.Watch(request), health.Watch(request)
    assert await next_status(leaver) == await next_status(stayer) == SERVING
    leaver.cancel()
    await asyncio.sleep(0.05)
    engine.become(EngineState.RESTARTING)
    assert await next_status(stayer) == NOT_SERVING
    stayer.cancel()


async def test_silent_engine_is_noticed_without_an_event(health, engine, server):
    watch = health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert await next_status(watch) == SERVING
    engine.heartbeat_age_s = 11.0
    assert await next_status(watch) == NOT_SERVING
    assert server.readiness.reason() == "the engine has not reported for 11 s"
    engine.heartbeat_age_s = 0.1
    assert await next_status(watch) == SERVING
    watch.cancel()


async def test_loading_engine_says_what_it_loads(server, engine):
    engine.become(EngineState.LOADING)
    assert server.readiness.reason() == "the engine is loading: weights (25%)"
    engine.become(EngineState.FAILED)
    engine.failure = "no such file"
    assert server.readiness.reason() == "no such file"


async def test_reflection_lists_every_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = [reply async for reply in stub.ServerReflectionInfo(iter([request]))]
    assert {service.name for service in reply.list_services_response.service} == {
        INFERENCE,
        "heedful.v1.FeedbackService",
        "heedful.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_reflection_gives_the_contract(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE)
    (reply,) = [reply async for reply in stub.ServerReflectionInfo(iter([request]))]
    assert b"GenerateRequest" in reply.file_descriptor_response.file_descriptor_proto[0]


class TestPorts:
    @pytest.fixture
    def config(self):
        return load_config(None, {}, [("grpc.port", "0"), ("http.enabled", "false")])

    async def test_http_can_be_left_closed(self, server):
        assert server.http_address == ""

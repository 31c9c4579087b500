"""Draining: new calls are refused, running ones end, nothing hangs."""

import asyncio
import os
import signal
import socket
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub
from heedful_server.engine_client.client import EngineState
from heedful_server.errors import StartupError
from heedful_server.main import run
from heedful_server.serving import Server


def request(max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens)
    return pb.GenerateRequest(prompt=pb.Prompt(text="ab"), sampling=sampling)


async def start(stub, engine, max_tokens: int):
    """Return a call that the engine works on."""
    engine.step_s = 0.01
    call = asyncio.ensure_future(stub.Generate(request(max_tokens)))
    while not engine.num_running:
        await asyncio.sleep(0.01)
    return call


async def test_running_call_ends_and_new_ones_are_refused(server, stub, engine, channel):
    running = await start(stub, engine, 30)
    stopping = asyncio.create_task(server.stop(grace_s=10))
    await asyncio.sleep(0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request(1))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "heedful.v1.InferenceService", "heedful.v1.ModelService"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await running).completions[0].text == "ab" * 15
    await asyncio.wait_for(stopping, 5)


async def test_idle_server_stops_at_once(server):
    started_s = time.monotonic()
    await server.stop(grace_s=30)
    assert time.monotonic() - started_s < 2


async def test_watchers_do_not_hold_a_shutdown(server, channel):
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
    await watch.read()
    await asyncio.wait_for(server.stop(grace_s=30), 5)


async def test_call_beyond_the_grace_gets_what_there_is(server, stub, engine):
    running = await start(stub, engine, 250)
    await asyncio.wait_for(server.stop(grace_s=0.1), 5)
    (completion,) = (await running).completions
    assert completion.finish_reason == pb.FINISH_REASON_CANCELLED
    assert completion.text.startswith("ab")


async def test_hurry_ends_the_wait(server, stub, engine):
    engine.frozen = True
    running = await start(stub, engine, 250)
    stopping = asyncio.create_task(server.stop(grace_s=60))
    await asyncio.sleep(0.05)
    server.hurry()
    await asyncio.wait_for(stopping, 5)
    await asyncio.gather(running, return_exceptions=True)


async def test_aborting_calls_do_not_disturb_a_drain(server, stub, engine):
    running = await start(stub, engine, 30)
    stopping = asyncio.create_task(server.stop(grace_s=10))
    await asyncio.sleep(0.02)
    refused = await asyncio.gather(
        *(stub.Generate(request(0)) for _ in range(50)), return_exceptions=True
    )
    assert {error.code() for error in refused} == {grpc.StatusCode.UNAVAILABLE}
    assert (await running).completions[0].finish_reason == pb.FINISH_REASON_LENGTH
    await asyncio.wait_for(stopping, 5)


@pytest.mark.parametrize("port", ["grpc", "http"])
async def test_port_in_use_is_told_by_its_setting(server, config, model, make_engine, port):
    address = {"grpc": server.grpc_address, "http": server.http_address}[port]
    taken = int(address.rpartition(":")[2])
    group = getattr(config, port).model_copy(update={"port": taken})
    second = Server(config.model_copy(update={port: group}), model, make_engine)
    with pytest.raises(StartupError, match=rf"{port}\.port"):
        await second.start()
    await second.stop(0)


class Program:
    """main.run in this process's loop, over the toy engine."""

    def __init__(self, config, model, make_engine) -> None:
        self.server_engine = None
        self.address = f"127.0.0.1:{config.grpc.port}"
        self._task = asyncio.ensure_future(
            run(config, model, time.monotonic(), self._keep(make_engine))
        )

    def _keep(self, make_engine):
        def make(*args, **kwargs):
            self.server_engine = make_engine(*args, **kwargs)
            return self.server_engine

        return make

    async def until_ready(self) -> None:
        while self.server_engine is None or self.server_engine.info is None:
            await asyncio.sleep(0.01)

    async def exit_code(self, timeout_s: float) -> int:
        return await asyncio.wait_for(self._task, timeout_s)


@pytest.fixture
async def program(config, model, make_engine):
    with socket.create_server(("127.0.0.1", 0)) as free:
        grpc_group = config.grpc.model_copy(update={"port": free.getsockname()[1]})
    program = Program(config.model_copy(update={"grpc": grpc_group}), model, make_engine)
    await program.until_ready()
    await asyncio.sleep(0.05)
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_program_cleanly(program, number):
    os.kill(os.getpid(), number)
    assert await program.exit_code(5) == 0
    assert program.server_engine.state is EngineState.STOPPED


async def test_second_signal_does_not_wait_for_calls(program):
    program.server_engine.frozen = True
    async with grpc.aio.insecure_channel(program.address) as channel:
        call = InferenceServiceStub(channel).Generate(request(5))
        while not program.server_engine.num_running:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(program._task), 0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await program.exit_code(5) == 0
        call.cancel()


async def test_model_that_cannot_be_served_ends_the_program(config, model, make_engine, capfd):
    def make(*args, **kwargs):
        engine = make_engine(*args, **kwargs)
        engine.failure = "no such weights"
        return engine

    assert await asyncio.wait_for(run(config, model, time.monotonic(), make), 5) == 1
    assert "heedful-server: no such weights" in capfd.readouterr().err

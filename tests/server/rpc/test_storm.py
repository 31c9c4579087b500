"""Many callers at once, who cancel, run out of time or leave: nothing leaks, nothing hangs."""

import asyncio
import random

import grpc
import grpc.aio
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub

NUM_CALLERS = 64
CALLS_EACH = 4


def request(rng: random.Random) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=rng.choice([1, 5, 100]))
    return pb.GenerateRequest(prompt=pb.Prompt(text="ab"), n=rng.choice([1, 3]), sampling=sampling)


async def unary(stub: InferenceServiceStub, rng: random.Random) -> None:
    call = stub.Generate(request(rng), timeout=rng.choice([0.01, 0.1, 30]))
    if rng.random() < 0.3:
        await asyncio.sleep(rng.random() * 0.05)
        call.cancel()
    await call


async def stream(stub: InferenceServiceStub, rng: random.Random) -> None:
    wanted = pb.GenerateStreamRequest(request=request(rng))
    call = stub.GenerateStream(wanted, timeout=rng.choice([0.01, 0.1, 30]))
    num_messages = 0
    async for _ in call:
        num_messages += 1
        if rng.random() < 0.1:
            call.cancel()


def may_happen(error: grpc.aio.AioRpcError) -> bool:
    return error.code() in {
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
    }


async def caller(address: str, seed: int) -> None:
    rng = random.Random(seed)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)
        for _ in range(CALLS_EACH):
            try:
                await (unary if rng.random() < 0.5 else stream)(stub, rng)
            except asyncio.CancelledError:
                continue
            except grpc.aio.AioRpcError as error:
                if not may_happen(error):
                    raise


async def test_storm_of_cancels_deadlines_and_a_dying_engine(server, engine, stub):
    engine.step_s = 0.002
    storm = asyncio.gather(*(caller(server.grpc_address, seed) for seed in range(NUM_CALLERS)))
    await asyncio.sleep(0.2)
    engine.die()
    await asyncio.sleep(0.1)
    engine.become(type(engine.state).READY)
    await asyncio.wait_for(storm, 60)
    while engine.num_running:
        await asyncio.sleep(0.01)
    value = server.metrics.registry.get_sample_value
    assert value("heedful_sequences_in_flight") == 0
    reply = await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="ab")))
    assert reply.completions[0].text.startswith("abab")

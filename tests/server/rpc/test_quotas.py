"""Quotas on a real port, with a clock that stands still."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from heedful_proto.v1 import inference_pb2
from heedful_server.serving import Server
from heedful_server.setting_groups import QuotaSettings


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quota() -> QuotaSettings:
    return QuotaSettings()


@pytest.fixture
async def server(config, quota, clock, model, make_engine):
    config = config.model_copy(update={"quota": quota})
    server = Server(config, model, make_engine, quota_clock=clock)
    await server.start()
    await server.engine.wait_ready()
    yield server
    await server.stop(0.0)


async def refused_for_s(call) -> float:
    """Return the delay that a refusal tells."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    details = rpc_status.from_call(caught.value).details
    assert any(detail.Unpack(info) for detail in details)
    assert info.reason == "QUOTA_EXCEEDED"
    assert any(detail.Unpack(retry) for detail in details)
    return retry.retry_delay.ToMilliseconds() / 1000


@pytest.mark.parametrize("quota", [QuotaSettings(requests_per_s=0.5, burst_s=2)])
async def test_requests_over_the_quota_are_told_when_to_come_back(generate, clock):
    await generate()
    assert await refused_for_s(generate()) == pytest.approx(2.0)
    clock.now_s += 2.0
    await generate()


@pytest.mark.parametrize("quota", [QuotaSettings(tokens_per_s=10, burst_s=10)])
async def test_tokens_that_were_not_generated_are_given_back(generate, stub, clock):
    # A prompt of 5 tokens and up to 60 more; the stop string ends it after 5.
    sampling = inference_pb2.SamplingParams(max_tokens=60, stop=["o"])
    for _ in range(4):
        await generate("hello", sampling=sampling)
    # 60 are left of 100; what is refused costs nothing.
    for _ in range(2):
        assert await refused_for_s(generate("hello", max_tokens=60)) == pytest.approx(0.5)
    clock.now_s += 0.5
    await generate("hello", max_tokens=60)
    assert await refused_for_s(generate("hello", max_tokens=5)) == pytest.approx(1.0)


@pytest.mark.parametrize("quota", [QuotaSettings(tokens_per_s=10, burst_s=10)])
async def test_stream_that_its_caller_leaves_gives_back_too(server, engine, stub, generate):
    engine.step_s = 0.05
    sampling = inference_pb2.SamplingParams(max_tokens=90)
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="hello"), sampling=sampling
    )
    call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(request=request))
    await call.read()
    assert await refused_for_s(generate("hello", max_tokens=60)) > 5
    call.cancel()
    while engine.num_running:
        await asyncio.sleep(0.01)
    await generate("hello", max_tokens=60)


@pytest.mark.parametrize("quota", [QuotaSettings(feedback_per_s=0.5, burst_s=4)])
async def test_feedback_has_a_quota_of_its_own(generate, submit, said, clock):
    (answer,) = (await generate()).completions
    await submit(said(answer))
    await submit(said(answer, rater_id="bob"))
    event = said(answer, rater_id="eve")
    assert await refused_for_s(submit(event)) == pytest.approx(2.0)
    await generate()
    clock.now_s += 2.0
    await submit(event)

"""Admission: the bound on sequences in flight and when a refused caller should come back."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from heedful_proto.v1 import inference_pb2 as pb
from heedful_server.config import load_config
from heedful_server.errors import QueueFull
from heedful_server.rpc.admission import Admission


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(capacity=4, on_change=lambda _: None, clock=clock)


def test_admits_up_to_the_capacity_and_refuses_beyond(admission: Admission) -> None:
    admission.admit(3)
    admission.admit(1)
    with pytest.raises(QueueFull, match="4 sequences are in flight and 4 is the limit"):
        admission.admit(1)
    admission.release(2)
    admission.admit(2)
    assert admission.num_in_flight == 4


def test_idle_server_admits_what_is_bigger_than_the_capacity(admission: Admission) -> None:
    admission.admit(16)
    with pytest.raises(QueueFull):
        admission.admit(1)
    admission.release(16)
    assert admission.num_in_flight == 0


def test_retry_follows_the_rate_at_which_sequences_end(admission: Admission, clock: Clock) -> None:
    for _ in range(20):
        admission.admit(1)
        admission.release(1)
        clock.now_s += 0.5
    admission.admit(4)
    with pytest.raises(QueueFull) as caught:
        admission.admit(4)
    assert caught.value.retry_after_s == pytest.approx(4 * 0.5)


def test_retry_is_bounded(admission: Admission, clock: Clock) -> None:
    admission.admit(4)
    with pytest.raises(QueueFull) as caught:
        admission.admit(1)
    assert caught.value.retry_after_s == 1.0
    admission.release(2)
    clock.now_s += 10_000
    admission.admit(2)
    with pytest.raises(QueueFull) as caught:
        admission.admit(1)
    assert caught.value.retry_after_s == 30.0


class TestOnTheWire:
    @pytest.fixture
    def config(self):
        overrides = [("engine.max_sequences", "1"), ("engine.max_queue", "1")]
        return load_config(None, {}, [("grpc.port", "0"), ("http.port", "0"), *overrides])

    async def test_full_queue_is_resource_exhausted_with_retry_info(self, stub, engine, server):
        engine.frozen = True
        request = pb.GenerateRequest(prompt=pb.Prompt(text="x"), n=2)
        running = stub.Generate(request)
        while not engine.num_running:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        details = rpc_status.from_call(caught.value).details
        assert any(detail.Unpack(retry) for detail in details)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        engine.frozen = False
        assert await running
        assert await stub.Generate(request)
        rejected = server.metrics.registry.get_sample_value(
            "heedful_requests_rejected_total", {"reason": "queue_full"}
        )
        assert rejected == 1

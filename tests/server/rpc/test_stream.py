"""GenerateStream: order, coalescing, endings, cancellation, slow readers."""

import asyncio
import time

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub
from heedful_server.config import load_config
from heedful_store.ids import is_uuid7


def request(text: str = "hello", n: int = 1, **sampling: object) -> pb.GenerateStreamRequest:
    inner = pb.GenerateRequest(
        prompt=pb.Prompt(text=text), n=n, sampling=pb.SamplingParams(**sampling)
    )
    return pb.GenerateStreamRequest(request=inner)


async def read(call) -> list[pb.GenerateStreamResponse]:
    return [message async for message in call]


async def read_all(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_first_message_holds_ids_version_and_seed(stub):
    head, *rest = await read(stub.GenerateStream(request("ab", n=2, max_tokens=3, seed=5)))
    assert head.WhichOneof("event") == "head"
    assert head.head.served_by.policy_version == "base"
    assert head.head.served_by.seed == 5
    assert head.head.served_by.request_id
    assert [c.index for c in head.head.completions] == [0, 1]
    assert all(is_uuid7(c.completion_id) for c in head.head.completions)
    assert {message.WhichOneof("event") for message in rest} == {"delta"}


async def test_deltas_laid_end_to_end_are_the_whole_answer(stub):
    wanted = request("a😀bc", n=2, max_tokens=40, logprobs=True)
    whole = await stub.Generate(wanted.request)
    messages = await read(stub.GenerateStream(wanted))
    for completion in whole.completions:
        deltas = [m.delta for m in messages[1:] if m.delta.index == completion.index]
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [i for delta in deltas for i in delta.token_ids] == list(completion.token_ids)
        assert [e for delta in deltas for e in delta.logprobs] == list(completion.logprobs)
        assert [d.finish_reason for d in deltas[:-1]] == [0] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == completion.finish_reason
        assert deltas[-1].usage == completion.usage


async def test_tokens_are_coalesced_to_the_interval(stub, engine, config):
    engine.step_s = 0.001
    started_s = time.monotonic()
    messages = await read(stub.GenerateStream(request("ab", max_tokens=200)))
    elapsed_s = time.monotonic() - started_s
    num_tokens = sum(len(message.delta.token_ids) for message in messages)
    assert num_tokens == 200
    # The head, the first token and the end come at once; between them one message an interval.
    assert len(messages) <= 3 + elapsed_s / config.stream_interval_s


async def test_first_token_does_not_wait_for_the_interval(server, stub, engine, model):
    engine.step_s = 0.05
    call = stub.GenerateStream(request("ab", max_tokens=4))
    await call.read()
    first = (await call.read()).delta
    assert list(first.token_ids) == list(b"a")
    call.cancel()


async def test_stop_string_is_named_in_the_last_delta(stub):
    messages = await read(stub.GenerateStream(request("abcdef", max_tokens=50, stop=["de"])))
    assert "".join(message.delta.text for message in messages) == "abc"
    assert messages[-1].delta.stop == "de"
    assert messages[-1].delta.finish_reason == pb.FINISH_REASON_STOP


async def test_deadline_ends_the_stream_in_order(stub, engine):
    engine.step_s = 0.02
    messages = await read(stub.GenerateStream(request("ab", max_tokens=200), timeout=2))
    assert messages[-1].delta.finish_reason == pb.FINISH_REASON_DEADLINE
    assert messages[-1].delta.usage.completion_tokens > 0


async def test_cancelled_stream_frees_the_engine(stub, engine, server):
    engine.step_s = 0.02
    call = stub.GenerateStream(request("ab", n=4, max_tokens=200))
    await call.read()
    call.cancel()
    while engine.num_running:
        await asyncio.sleep(0.01)
    value = server.metrics.registry.get_sample_value
    assert value("heedful_sequences_in_flight") == 0
    assert value("heedful_request_success_total", {"finished_reason": "cancelled"}) == 4


async def test_reader_that_left_frees_the_engine(server, engine):
    engine.step_s = 0.02
    channel = grpc.aio.insecure_channel(server.grpc_address)
    call = InferenceServiceStub(channel).GenerateStream(request("ab", max_tokens=200))
    await call.read()
    await channel.close()
    while engine.num_running:
        await asyncio.sleep(0.01)


async def test_death_of_the_engine_ends_the_stream_with_a_status(stub, engine):
    engine.step_s = 0.02
    messages = aiter(stub.GenerateStream(request("ab", max_tokens=200)))
    await anext(messages)
    await anext(messages)
    engine.die()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(messages)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_broken_rule_ends_the_stream_before_its_head(stub, violation, engine):
    call = stub.GenerateStream(request("ab", temperature=-1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    assert violation(caught.value)[0] == "sampling.temperature"
    assert not engine.submitted


async def test_missing_request_names_the_prompt(stub, violation):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(stub.GenerateStream(pb.GenerateStreamRequest()))
    assert violation(caught.value)[0] == "prompt"


class TestSlowReader:
    """A reader that takes nothing: HTTP/2 windows fill, and then writes block."""

    @pytest.fixture
    def config(self):
        overrides = [("grpc.port", "0"), ("http.port", "0"), ("grpc.write_timeout_s", "0.3")]
        return load_config(None, {}, [*overrides, ("stream_interval_s", "0")])

    async def test_is_cancelled_and_frees_the_engine(self, server, engine):
        engine.step_s = 0.001
        # Alternatives make messages big, so that the windows fill within a context's length.
        wanted = request("ab", n=16, max_tokens=250, top_logprobs=20)
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        async with grpc.aio.insecure_channel(server.grpc_address, options=options) as channel:
            call = InferenceServiceStub(channel).GenerateStream(wanted)
            await call.read()
            deadline_s = time.monotonic() + 20
            value = server.metrics.registry.get_sample_value
            labels = {"reason": "client_too_slow"}
            while not value("heedful_requests_rejected_total", labels):
                assert time.monotonic() < deadline_s, "the stream was never given up"
                await asyncio.sleep(0.05)
            assert value("heedful_sequences_in_flight") == 0
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED

"""The program as its users meet it: a real server with a real engine child, through the client."""

import asyncio
import math

import grpc
import heedful
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from heedful import FinishReason
from heedful.errors import error_from_rpc
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub

SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_stream_and_generate_give_the_same_answer(client):
    prompt = [{"role": "user", "content": "Say something."}]
    options = {"max_tokens": 24, "seed": 7, "ignore_eos": True}
    whole = await client.generate(prompt, **options)
    async with client.stream(prompt, **options) as stream:
        deltas = [delta async for delta in stream]
        streamed = stream.generation
    assert "".join(delta.text for delta in deltas) == whole.text
    assert streamed.completions[0].token_ids == whole.completions[0].token_ids
    assert len(whole.completions[0].token_ids) == 24
    assert whole.completions[0].finish_reason is FinishReason.LENGTH
    assert whole.completions[0].rateable


async def test_score_agrees_with_the_logprobs_of_sampling(client):
    prompt = heedful.Text("heed")
    sampled = await client.generate(
        prompt, max_tokens=12, seed=1, logprobs=True, ignore_eos=True, temperature=0.7
    )
    completion = sampled.completions[0]
    (score,) = await client.score([(prompt, completion.token_ids)])
    assert score.token_ids == completion.token_ids
    raw = [item.logprob for item in completion.logprobs]
    assert score.logprobs == pytest.approx(raw, abs=1e-4)
    assert score.total_logprob == pytest.approx(math.fsum(raw), abs=1e-3)


async def test_tokens_and_text_go_both_ways(client):
    text = "naïve, 人工 🌍\n"
    tokens = await client.tokenize(text)
    assert await client.detokenize(tokens.token_ids) == text
    chat = await client.tokenize([{"role": "user", "content": text}])
    assert text in chat.rendered


async def test_samples_of_one_prompt_differ_and_can_be_repeated(client):
    options = {"n": 6, "max_tokens": 16, "seed": 3, "ignore_eos": True}
    first = await client.generate("hello", **options)
    again = await client.generate("hello", **options)
    answers = [completion.token_ids for completion in first.completions]
    assert [completion.index for completion in first.completions] == list(range(6))
    assert len(set(answers)) == 6
    assert answers == [completion.token_ids for completion in again.completions]


@pytest.mark.parametrize("temperature", [0, 1])
async def test_answer_is_the_same_alone_and_among_others_bit_for_bit(client, server, temperature):
    if 'kernel_path="native' not in server.get("/metrics")[1]:
        pytest.skip("the native CPU kernels are not built (make native)")
    options = {"max_tokens": 32, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    mine = {**options, "temperature": temperature, "seed": 11}
    alone = await client.generate("What is heed?", **mine)
    others = [
        client.generate(f"{idx} " * (idx + 1), seed=idx, temperature=0.5 + idx % 3, **options)
        for idx in range(31)
    ]
    crowd = await asyncio.gather(
        *others[:15], client.generate("What is heed?", **mine), *others[15:]
    )
    # Values are compared exactly: one differing bit of one log-prob fails.
    assert crowd[15].completions[0].token_ids == alone.completions[0].token_ids
    assert crowd[15].completions[0].logprobs == alone.completions[0].logprobs


async def test_generic_client_lists_and_watches_the_services(server):
    async with grpc.aio.insecure_channel(server.target) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        names = {s.name for s in (await call.read()).list_services_response.service}
        ours = {f"heedful.v1.{kind}Service" for kind in ("Inference", "Feedback", "Model")}
        assert ours | {"grpc.health.v1.Health"} <= names
        health = health_pb2_grpc.HealthStub(channel)
        for name in ["", *ours]:
            watch = health.Watch(health_pb2.HealthCheckRequest(service=name))
            assert (await watch.read()).status == SERVING
            watch.cancel()


async def test_http_port_tells_health_and_figures(client, server):
    assert server.get("/healthz") == (200, "ok\n")
    assert server.get("/readyz") == (200, "ready\n")
    before = server.metric("heedful_generation_tokens_total")
    await client.generate("count", max_tokens=5, ignore_eos=True)
    assert server.metric("heedful_generation_tokens_total") == before + 5
    assert server.metric("heedful_engine_restarts_total") == 0
    assert server.metric("heedful_num_requests_running") == 0
    assert server.get("/nothing")[0] == 404


def generate(**fields) -> pb.GenerateRequest:
    fields.setdefault("prompt", pb.Prompt(text="ab"))
    return pb.GenerateRequest(**fields)


def sampling(**fields) -> pb.GenerateRequest:
    return generate(sampling=pb.SamplingParams(**fields))


BAD_REQUESTS = {
    "empty prompt": (generate(prompt=pb.Prompt(text="")), "prompt.text"),
    "no prompt": (generate(prompt=pb.Prompt()), "prompt"),
    "prompt beyond the context": (generate(prompt=pb.Prompt(text="a" * 600)), "prompt.text"),
    "n of 0": (generate(n=0), "n"),
    "n of 2**31": (generate(n=2**31), "n"),
    "negative temperature": (sampling(temperature=-1), "sampling.temperature"),
    "NaN": (sampling(top_p=math.nan), "sampling.top_p"),
    "10 000 stop strings": (sampling(stop=["x"] * 10_000), "sampling.stop"),
    "token id out of range": (
        generate(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5, 10**6]))),
        "prompt.token_ids.ids[1]",
    ),
    "bias of a token out of range": (
        sampling(logit_bias=[pb.LogitBias(token_id=10**6, bias=1)]),
        "sampling.logit_bias[0].token_id",
    ),
    "schema that is not JSON": (
        generate(constraint=pb.Constraint(json_schema="{")),
        "constraint.json_schema",
    ),
    "broken regex": (generate(constraint=pb.Constraint(regex="(")), "constraint.regex"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_input_names_its_field_and_leaves_the_engine_alone(server, name):
    request, field = BAD_REQUESTS[name]
    async with grpc.aio.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceServiceStub(channel).Generate(request, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = error_from_rpc(caught.value).details.violations
    assert [violation.field for violation in violations] == [field]


async def test_bytes_that_are_no_request_leave_the_engine_alone(server):
    method = "/heedful.v1.InferenceService/Generate"
    invalid_utf8 = b"\x12\x04\x0a\x02\xff\xfe"
    async with grpc.aio.insecure_channel(server.target) as channel:
        call = channel.unary_unary(method)
        for message in (b"\xff" * 64, invalid_utf8, b"\x00" * (5 * 1024 * 1024)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(message, timeout=30)
            assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        reply = await InferenceServiceStub(channel).Generate(sampling(max_tokens=1), timeout=30)
    assert len(reply.completions) == 1


async def test_unknown_model_is_not_found(client):
    with pytest.raises(heedful.NotFound):
        await client.generate("hello", model="someone-elses")

"""What the asynchronous client sends, and what it makes of replies."""

import asyncio
from datetime import UTC, datetime

import heedful
import pytest
from heedful import (
    AsyncClient,
    Consent,
    FinishReason,
    InvalidRequest,
    Message,
    ServingStatus,
    Text,
)
from heedful_proto.v1 import inference_pb2 as pb


@pytest.fixture
async def client(server):
    async with AsyncClient(server.target) as client:
        yield client


async def test_generate_returns_a_typed_generation(client):
    generation = await client.generate("hello", n=2, seed=5)
    assert [item.text for item in generation.completions] == ["hello", "elloh"]
    first = generation.completions[0]
    assert first.token_ids == tuple(b"hello")
    assert first.finish_reason is FinishReason.STOP
    assert (first.completion_id, first.completion_token) == ("id-0", "token-0")
    assert first.rateable
    assert generation.usage == heedful.Usage(5, 1, 10)
    assert generation.served_by.seed == 5
    assert generation.served_by.policy_version == "base"
    assert generation.text == "hello"


async def test_completion_token_is_not_in_the_repr(client):
    generation = await client.generate("hello")
    assert "token-0" not in repr(generation)


async def test_log_probs_are_typed_and_absent_unless_asked_for(client):
    plain = await client.generate("ab")
    detailed = await client.generate("ab", logprobs=True, top_logprobs=2)
    assert plain.completions[0].logprobs == ()
    entry = detailed.completions[0].logprobs[1]
    assert (entry.token_id, entry.token, entry.logprob) == (98, "b", -0.5)
    assert (entry.sampling_logprob, entry.kept_mass) == (-0.25, 0.75)
    assert [(top.token_id, top.logprob) for top in entry.top] == [(0, -1.0), (1, -2.0)]


async def test_every_option_reaches_the_wire(client, script):
    await client.generate(
        "x",
        model="v3",
        n=1,
        best_of=2,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={3: 1.5},
        seed=2**64 - 1,
        min_tokens=1,
        max_tokens=9,
        stop=["a", "b"],
        stop_token_ids=[4],
        logprobs=True,
        top_logprobs=1,
        ignore_eos=False,
        json_schema={"type": "object"},
        priority="background",
        end_user="u",
        conversation_id="c",
        tags=["t"],
        consent=Consent(log="metadata", train=False),
        purpose="rollout",
    )
    expected = pb.GenerateRequest(
        model="v3",
        prompt=pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])),
        n=1,
        best_of=2,
        sampling=pb.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.75,
            logit_bias=[pb.LogitBias(token_id=3, bias=1.5)],
            seed=2**64 - 1,
            min_tokens=1,
            max_tokens=9,
            stop=["a", "b"],
            stop_token_ids=[4],
            logprobs=True,
            top_logprobs=1,
        ),
        constraint=pb.Constraint(json_schema='{"type": "object"}'),
        priority=pb.PRIORITY_BACKGROUND,
        end_user="u",
        conversation_id="c",
        tags=["t"],
        consent=pb.Consent(log=pb.LOG_CONSENT_METADATA, train=pb.TRAIN_CONSENT_NO),
        purpose=pb.PURPOSE_ROLLOUT,
        project="default",
    )
    assert script.requests[0] == expected


def test_every_field_of_the_contract_has_an_option():
    fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    fields |= {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    elsewhere = {"prompt", "sampling", "constraint", "project"}
    forms = {"json_schema", "regex", "timeout_s"}
    assert heedful.GenerateOptions.__optional_keys__ == (fields - elsewhere) | forms


async def test_unset_options_stay_unset_on_the_wire(client, script):
    await client.generate("x", temperature=None, seed=None)
    sampling = script.requests[0].sampling
    assert not any(sampling.HasField(name) for name in ("temperature", "seed", "max_tokens"))
    assert not script.requests[0].HasField("n")


async def test_zero_is_not_the_same_as_unset(client, script):
    await client.generate("x", temperature=0, seed=0)
    sampling = script.requests[0].sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")


@pytest.mark.parametrize(
    ("prompt", "form", "expected"),
    [
        ("abc", "chat", "abc"),
        (Text("abc"), "text", "abc"),
        ([Message("system", "s"), Message("user", "abc")], "chat", "abc"),
        ([{"role": "user", "content": "abc"}], "chat", "abc"),
        ([97, 98], "token_ids", "ab"),
    ],
)
async def test_the_form_of_the_prompt_follows_its_type(client, script, prompt, form, expected):
    generation = await client.generate(prompt)
    assert script.requests[0].prompt.WhichOneof("form") == form
    assert generation.text == expected


@pytest.mark.parametrize("prompt", [{"role": "user"}, b"abc", [1.5], [None]])
async def test_a_prompt_of_another_type_is_a_type_error(client, prompt):
    with pytest.raises(TypeError, match="prompt"):
        await client.generate(prompt)


async def test_an_unknown_option_names_the_nearest(client):
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        await client.generate("x", temprature=1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": -1}, "n"),
        ({"n": 2**32}, "n"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"stop_token_ids": [-1]}, "sampling.stop_token_ids"),
        ({"logit_bias": {-1: 0.0}}, "sampling.logit_bias.token_id"),
        ({"stop": ["\ud800"]}, "sampling.stop"),
        ({"priority": "urgent"}, "priority"),
        ({"json_schema": "{}", "regex": "a"}, "constraint"),
    ],
)
async def test_what_the_wire_cannot_hold_is_an_invalid_request(client, script, options, field):
    with pytest.raises(InvalidRequest) as caught:
        await client.generate("x", **options)
    assert caught.value.field == field
    assert script.attempts == 0


async def test_stream_yields_deltas_in_order_and_ends_with_the_whole(client, script):
    script.tokens_per_message = 2
    stream = client.stream("hello", n=2, logprobs=True)
    deltas = [delta async for delta in stream]
    assert [(delta.index, delta.text) for delta in deltas] == [
        (0, "he"),
        (1, "el"),
        (0, "ll"),
        (1, "lo"),
        (0, "o"),
        (1, "h"),
    ]
    assert [delta.finish_reason for delta in deltas[-2:]] == [FinishReason.STOP] * 2
    assert deltas[0].usage is None
    assert deltas[-1].usage == heedful.Usage(5, 1, 5)
    assert stream.generation == await client.generate("hello", n=2, logprobs=True)


async def test_the_head_comes_before_any_text(client):
    async with client.stream("hello") as stream:
        served_by = await stream.head()
        assert served_by.base_model == "Echo-1"
        assert stream.generation.completions[0].completion_token == "token-0"
        assert stream.generation.text == ""
        assert stream.generation.completions[0].finish_reason is None


async def test_texts_yields_the_first_completion_only(client):
    pieces = [piece async for piece in client.stream("hello", n=3).texts()]
    assert pieces == ["he", "ll", "o"]


async def test_a_stream_that_has_not_begun_has_no_generation(client):
    with pytest.raises(RuntimeError, match="not begun"):
        _ = client.stream("x").generation


async def test_score_of_text_and_token_ids(client, script):
    scores = await client.score([("p", "abc"), (Text("p"), [1, 2])], reward=True)
    assert [score.token_ids for score in scores] == [(97, 98, 99), (1, 2)]
    assert scores[0].logprobs == (-0.5, -0.5, -0.5)
    assert scores[0].total_logprob == -1.5
    assert scores[0].reward == 1.5
    assert scores[0].policy_version == "base"
    items = script.scores[0].items
    assert [item.prompt.WhichOneof("form") for item in items] == ["chat", "text"]


async def test_score_of_an_empty_completion_still_says_which_form(client, script):
    scores = await client.score([("p", []), ("p", "")])
    assert [score.token_ids for score in scores] == [(), ()]
    forms = [item.WhichOneof("completion") for item in script.scores[0].items]
    assert forms == ["token_ids", "text"]


async def test_tokenize_takes_a_str_as_plain_text_and_renders_messages(client):
    plain = await client.tokenize("ab")
    assert (plain.token_ids, plain.tokens, plain.rendered) == ((97, 98), ("a", "b"), "")
    assert plain.context_tokens == 2048
    chat = await client.tokenize([Message("user", "hi")])
    assert chat.rendered == "user:hi"


async def test_detokenize(client):
    assert await client.detokenize([104, 105]) == "hi"


async def test_models(client):
    models = await client.list_models()
    assert models.aliases == {"champion": "base"}
    version = models.versions[0]
    assert (version.version, version.state, version.loaded) == ("base", "champion", True)
    assert version.created == datetime(1970, 1, 2, tzinfo=UTC)


async def test_health_says_which_services_take_calls(client, server):
    assert (await client.health()).ready
    server.set_ready(False)
    health = await client.health()
    assert not health.ready
    assert health.inference is ServingStatus.NOT_SERVING
    assert health.feedback is ServingStatus.SERVING


async def test_project_and_api_key_travel_with_every_call(server, script):
    async with AsyncClient(server.target, api_key="secret", project="shop") as client:
        await client.generate("x")
        async for _ in client.stream("x"):
            pass
    assert [seen["authorization"] for seen in script.metadata] == ["Bearer secret"] * 2
    assert [request.project for request in script.requests] == ["shop"] * 2


async def test_many_calls_share_one_channel(client):
    texts = [f"call {i}" for i in range(20)]
    generations = await asyncio.gather(*(client.generate(text) for text in texts))
    assert [generation.text for generation in generations] == texts


async def test_a_closed_client_says_so(server):
    client = AsyncClient(server.target)
    await client.generate("x")
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("x")


def test_a_client_of_another_event_loop_says_so(server):
    client = AsyncClient(server.target)

    async def use_and_keep() -> None:
        await client.generate("x")

    async def use_again() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            await client.generate("x")

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(use_and_keep())
        second.run(use_again())
        first.run(client.close())

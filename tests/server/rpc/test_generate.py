"""Generate: what a whole answer holds."""

import asyncio

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import inference_pb2 as pb
from heedful_server.protocol import PRIORITY_BACKGROUND
from heedful_store.ids import is_uuid7

CONTEXT_TOKENS = 256


def text_request(text: str = "hello", **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text=text), sampling=pb.SamplingParams(**sampling))


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Prompt(chat=pb.ChatMessages(messages=messages))


async def test_text_prompt_is_continued_as_it_is(stub):
    reply = await stub.Generate(text_request("abc", max_tokens=5))
    (completion,) = reply.completions
    assert completion.text == "abcab"
    assert list(completion.token_ids) == list(b"abcab")
    assert completion.finish_reason == pb.FINISH_REASON_LENGTH
    assert completion.usage == pb.Usage(prompt_tokens=3, completion_tokens=5)
    assert reply.usage == completion.usage


async def test_conversation_is_rendered_by_the_template(stub, engine):
    prompt = chat(("system", "S"), ("user", "hi"))
    await stub.Generate(pb.GenerateRequest(prompt=prompt))
    (submitted,) = engine.submitted
    assert bytes(submitted.prompt_token_ids) == b"[system]S[user]hi[assistant]"


async def test_token_ids_are_used_as_they_are(stub, engine):
    request = pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5, 0, 255])))
    await stub.Generate(request)
    assert engine.submitted[0].prompt_token_ids == [5, 0, 255]


async def test_n_completions_share_one_request(stub, engine):
    request = text_request("abc", max_tokens=3)
    request.n = 3
    reply = await stub.Generate(request)
    assert [c.text for c in reply.completions] == ["abc", "bca", "cab"]
    assert [c.index for c in reply.completions] == [0, 1, 2]
    assert len(engine.submitted) == 1
    assert reply.usage == pb.Usage(prompt_tokens=3, completion_tokens=9)


async def test_every_completion_has_an_id_of_its_own(stub):
    request = text_request(max_tokens=1)
    request.n = 4
    ids = [c.completion_id for c in (await stub.Generate(request)).completions]
    assert len(set(ids)) == 4
    assert all(is_uuid7(completion_id) for completion_id in ids)


async def test_answer_says_what_served_it(stub):
    served_by = (await stub.Generate(text_request(max_tokens=1, seed=7))).served_by
    assert served_by.policy_version == "base"
    assert served_by.base_model == "byte-model"
    assert served_by.quantization == "none"
    assert served_by.seed == 7


async def test_seed_is_drawn_where_none_is_set(stub, engine):
    replies = [await stub.Generate(text_request(max_tokens=1)) for _ in range(2)]
    seeds = [reply.served_by.seed for reply in replies]
    assert seeds[0] != seeds[1]
    assert seeds == [submitted.sampling.seed for submitted in engine.submitted]


async def test_largest_seed_reaches_the_engine(stub, engine):
    reply = await stub.Generate(text_request(max_tokens=1, seed=2**64 - 1))
    assert reply.served_by.seed == engine.submitted[0].sampling.seed == 2**64 - 1


async def test_unset_parameters_take_the_defaults_of_the_contract(stub, engine):
    await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x" * 250)))
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0)
    assert sampling.max_tokens == CONTEXT_TOKENS - 250


async def test_parameters_reach_the_engine(stub, engine):
    request = text_request(
        temperature=0.5,
        top_p=0.25,
        top_k=2**32 - 1,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=[pb.LogitBias(token_id=3, bias=-100)],
        min_tokens=2,
        max_tokens=4,
        stop=["never"],
        stop_token_ids=[9],
        top_logprobs=2,
        ignore_eos=True,
    )
    request.priority = pb.PRIORITY_BACKGROUND
    await stub.Generate(request)
    (submitted,) = engine.submitted
    sampling = submitted.sampling
    assert submitted.priority == PRIORITY_BACKGROUND
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.25, 0.125)
    assert sampling.top_k == 257, "more than the vocabulary is the vocabulary"
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -2.0)
    assert sampling.frequency_penalty == 2.0
    assert sampling.logit_bias == ((3, -100.0),)
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 4)
    assert (sampling.stop, sampling.stop_token_ids) == (("never",), (9,))
    assert (sampling.top_logprobs, sampling.ignore_eos) == (2, True)


async def test_log_probs_come_only_where_asked_for(stub):
    (without,) = (await stub.Generate(text_request("ab", max_tokens=2))).completions
    assert not without.logprobs
    (with_them,) = (
        await stub.Generate(text_request("ab", max_tokens=2, logprobs=True))
    ).completions
    assert [entry.token for entry in with_them.logprobs] == ["a", "b"]
    assert [entry.token_id for entry in with_them.logprobs] == list(b"ab")
    first = with_them.logprobs[0]
    assert (first.logprob, first.sampling_logprob, first.kept_mass) == (-0.25, -0.125, 1.0)
    assert not first.top


async def test_top_logprobs_bring_alternatives_and_log_probs(stub):
    reply = await stub.Generate(text_request("ab", max_tokens=1, top_logprobs=2))
    (entry,) = reply.completions[0].logprobs
    assert [(top.token, top.logprob) for top in entry.top] == [("a", -0.25), ("b", -1.5)]


async def test_stop_string_ends_a_completion_and_is_named(stub):
    reply = await stub.Generate(text_request("abcdef", max_tokens=50, stop=["x", "de"]))
    (completion,) = reply.completions
    assert completion.text == "abc"
    assert completion.stop == "de"
    assert completion.finish_reason == pb.FINISH_REASON_STOP
    assert completion.usage.completion_tokens == len(completion.token_ids) == 5


async def test_characters_of_several_tokens_are_whole(stub):
    text = "a😀é"
    (completion,) = (await stub.Generate(text_request(text, max_tokens=7))).completions
    assert completion.text == text


async def test_request_id_is_taken_over_and_returned(stub):
    call = stub.Generate(text_request(max_tokens=1), metadata=[("x-request-id", "app-1:2_3")])
    assert (await call).served_by.request_id == "app-1:2_3"
    assert ("x-request-id", "app-1:2_3") in tuple(await call.trailing_metadata())


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, '"quoted"'])
async def test_unfit_request_id_is_replaced(stub, bad):
    call = stub.Generate(text_request(max_tokens=1), metadata=[("x-request-id", bad)])
    assert is_uuid7((await call).served_by.request_id)


async def test_equal_request_ids_do_not_meet_in_the_engine(stub, engine):
    metadata = [("x-request-id", "same")]
    request = text_request("ab", max_tokens=2)
    replies = await asyncio.gather(*(stub.Generate(request, metadata=metadata) for _ in range(8)))
    assert [reply.completions[0].text for reply in replies] == ["ab"] * 8
    assert len({submitted.request_id for submitted in engine.submitted}) == 8


async def test_deadline_brings_the_partial_answer(stub, engine):
    engine.step_s = 0.02
    reply = await stub.Generate(text_request("ab", max_tokens=200), timeout=2)
    (completion,) = reply.completions
    assert completion.finish_reason == pb.FINISH_REASON_DEADLINE
    assert completion.text.startswith("abab")
    assert 0 < completion.usage.completion_tokens < 200


async def test_cancelled_call_is_cancelled_in_the_engine(stub, engine, server):
    engine.step_s = 0.02
    call = stub.Generate(text_request("ab", max_tokens=200))
    while not engine.num_running:
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    while engine.num_running:
        await asyncio.sleep(0.01)
    assert server.metrics.registry.get_sample_value("heedful_sequences_in_flight") == 0


async def test_what_only_the_engine_can_refuse_names_its_field(stub, violation):
    request = text_request()
    request.constraint.regex = "unfollowable"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request)
    assert violation(caught.value) == ("constraint.regex", "cannot be followed")


async def test_template_that_refuses_names_the_conversation(stub, violation):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(prompt=chat(("user", "refuse"))))
    field, reason = violation(caught.value)
    assert field == "prompt.chat"
    assert "no such thing here" in reason


async def test_death_of_the_engine_is_unavailable_until_it_is_back(stub, engine):
    engine.step_s = 0.02
    calls = [stub.Generate(text_request("ab", max_tokens=200)) for _ in range(4)]
    while engine.num_running < 4:
        await asyncio.sleep(0.01)
    engine.die()
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(text_request())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    engine.state = type(engine.state).READY
    engine.step_s = 0
    assert (await stub.Generate(text_request("ab", max_tokens=2))).completions[0].text == "ab"


@pytest.mark.parametrize("name", ["", "champion", "base"])
async def test_names_of_the_base_are_served(stub, name):
    request = text_request(max_tokens=1)
    request.model = name
    assert (await stub.Generate(request)).served_by.policy_version == "base"


async def test_unknown_models_are_not_found(stub):
    request = text_request()
    request.model = "v7"
    with pytest.raises(grpc.aio.AioRpcError, match="v7") as caught:
        await stub.Generate(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND

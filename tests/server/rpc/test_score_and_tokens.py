"""Score, Tokenize, Detokenize, GetCompletion and the services that are laid out only."""

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1 import models_pb2

EOS_ID = 256


def item(prompt: str, **completion: object) -> pb.ScoreItem:
    return pb.ScoreItem(prompt=pb.Prompt(text=prompt), **completion)


async def test_score_closes_text_by_the_end_token_and_ids_not(stub, engine):
    ids = pb.TokenIds(ids=[1, 2, 3])
    request = pb.ScoreRequest(items=[item("p", text="ab"), item("q", token_ids=ids)])
    reply = await stub.Score(request)
    assert [list(score.token_ids) for score in reply.scores] == [[*b"ab", EOS_ID], [1, 2, 3]]
    assert [list(score.logprobs) for score in reply.scores] == [[-0.5] * 3, [-0.5] * 3]
    assert [score.total_logprob for score in reply.scores] == [-1.5, -1.5]
    assert reply.policy_version == "base"
    assert [list(i.prompt_token_ids) for i in engine.scored[0].items] == [[*b"p"], [*b"q"]]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (item("p" * 256, text="a"), "items[1].prompt.text"),
        (item("p" * 200, text="a" * 56), "items[1].text"),
        (item("p", token_ids=pb.TokenIds(ids=[257])), "items[1].token_ids.ids[0]"),
        (
            pb.ScoreItem(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1, 257])), text="a"),
            "items[1].prompt.token_ids.ids[1]",
        ),
    ],
)
async def test_score_names_the_item_that_does_not_fit(stub, engine, violation, bad, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(pb.ScoreRequest(items=[item("p", text="a"), bad]))
    assert violation(caught.value)[0] == field
    assert not engine.scored


async def test_score_past_its_deadline_frees_what_it_held(stub, engine, server):
    engine.frozen = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(pb.ScoreRequest(items=[item("p", text="a")]), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.frozen = False
    assert await stub.Score(pb.ScoreRequest(items=[item("p", text="a")]))
    assert server.metrics.registry.get_sample_value("heedful_sequences_in_flight") == 0


async def test_tokenize_text(stub):
    reply = await stub.Tokenize(pb.TokenizeRequest(text="aé"))
    assert bytes(reply.token_ids) == "aé".encode()
    assert list(reply.tokens) == ["a", "", ""]
    assert reply.rendered == ""
    assert reply.context_tokens == 256


async def test_tokenize_conversation_shows_the_rendered_template(stub):
    turns = [pb.ChatMessage(role="user", content="hi")]
    reply = await stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatMessages(messages=turns)))
    assert reply.rendered == "[user]hi[assistant]"
    assert bytes(reply.token_ids).decode() == reply.rendered


async def test_tokenize_refused_by_the_template_names_its_own_field(stub, violation):
    turns = [pb.ChatMessage(role="user", content="refuse")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatMessages(messages=turns)))
    assert violation(caught.value)[0] == "chat"


async def test_detokenize(stub):
    request = pb.DetokenizeRequest(token_ids=[*"é".encode(), EOS_ID])
    assert (await stub.Detokenize(request)).text == "é<eos>"
    request.skip_special_tokens = True
    assert (await stub.Detokenize(request)).text == "é"
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=[0xC3]))).text == "\ufffd"


async def test_detokenize_names_an_id_beyond_the_vocabulary(stub, violation):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2**32 - 1]))
    assert violation(caught.value)[0] == "token_ids[1]"


async def test_models_answer_for_the_base(models_stub):
    reply = await models_stub.ListModels(models_pb2.ListModelsRequest())
    (model,) = reply.models
    assert (model.version, model.base_model, model.quantization) == ("base", "byte-model", "none")
    assert (model.loaded, model.context_tokens) == (True, 256)
    assert model.state == models_pb2.POLICY_STATE_CHAMPION
    assert [(alias.name, alias.version) for alias in reply.aliases] == [("champion", "base")]
    got = await models_stub.GetModel(models_pb2.GetModelRequest(model="champion"))
    assert got.model == model


async def test_unknown_model_is_not_found(models_stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await models_stub.GetModel(models_pb2.GetModelRequest(model="v9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND

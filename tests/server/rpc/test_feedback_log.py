"""Every answer gets its row, as far as consent allows; without one it still arrives."""

import asyncio
import sqlite3
from pathlib import Path

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import feedback_pb2 as fb
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.feedback_pb2_grpc import FeedbackServiceStub
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub
from heedful_server.errors import StartupError
from heedful_server.feedback import upkeep
from heedful_server.serving import Server
from heedful_store import uuid7

S = grpc.StatusCode
CHAT = pb.Prompt(
    chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="what is new?")])
)


@pytest.fixture
async def start(model, make_engine):
    """Start a server with another configuration and return it with its two stubs."""
    running = []

    async def start(config):
        server = Server(config, model, make_engine)
        await server.start()
        await server.engine.wait_ready()
        channel = grpc.aio.insecure_channel(server.grpc_address)
        running.append((server, channel))
        return server, InferenceServiceStub(channel), FeedbackServiceStub(channel)

    yield start
    for server, channel in running:
        await channel.close()
        await server.stop(0.0)


def changed(config, **feedback: object):
    return config.model_copy(update={"feedback": config.feedback.model_copy(update=feedback)})


def ask(text: str = "hello", max_tokens: int = 4, **fields: object) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens)
    return pb.GenerateRequest(**({"prompt": pb.Prompt(text=text), "sampling": sampling} | fields))


async def logged(stub, completion_id: str) -> pb.LoggedCompletion:
    request = pb.GetCompletionRequest(completion_id=completion_id)
    return (await stub.GetCompletion(request)).completion


async def logged_soon(stub, completion_id: str) -> pb.LoggedCompletion:
    """Wait for a row that nobody waits for."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await logged(stub, completion_id)
            except grpc.aio.AioRpcError as error:
                if error.code() is not S.NOT_FOUND:
                    raise
                await asyncio.sleep(0.01)


async def test_a_logged_completion_holds_all_that_was_asked_and_answered(stub):
    request = ask(prompt=CHAT, n=2, end_user="ann", conversation_id="c1", tags=["a"])
    request.sampling.seed = 2**64 - 1
    request.sampling.stop.append("zz")
    request.sampling.logit_bias.add(token_id=65, bias=-1)
    answer = await stub.Generate(request)
    completion = answer.completions[1]
    found = await logged(stub, completion.completion_id)
    assert found.completion.text == completion.text
    assert found.completion.token_ids == completion.token_ids
    assert found.completion.finish_reason == completion.finish_reason
    assert found.completion.usage == completion.usage
    assert found.completion.index == 1
    assert [item.logprob for item in found.completion.logprobs] == [-0.25] * 4
    assert [item.sampling_logprob for item in found.completion.logprobs] == [-0.125] * 4
    assert [item.kept_mass for item in found.completion.logprobs] == [1.0] * 4
    assert found.served_by == answer.served_by
    assert found.served_by.seed == 2**64 - 1
    assert found.prompt_text == "[user]what is new?[assistant]"
    assert bytes(found.prompt_token_ids).decode() == found.prompt_text
    assert (list(found.sampling.stop), found.sampling.max_tokens) == (["zz"], 4)
    assert found.sampling.logit_bias[0].token_id == 65
    assert (found.end_user, found.conversation_id, list(found.tags)) == ("ann", "c1", ["a"])
    assert found.consent == pb.Consent(log=pb.LOG_CONSENT_FULL, train=pb.TRAIN_CONSENT_YES)
    assert found.duration.ToMicroseconds() > 0
    assert found.create_time.seconds > 1_700_000_000


async def test_a_prompt_of_token_ids_is_logged_with_its_text(stub):
    answer = await stub.Generate(ask(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=b"hi"))))
    found = await logged(stub, answer.completions[0].completion_id)
    assert found.prompt_text == "hi"


async def test_metadata_keeps_no_words(stub, config):
    consent = pb.Consent(log=pb.LOG_CONSENT_METADATA)
    request = ask("canary-prompt", consent=consent)
    request.sampling.stop.append("canary-stop")
    completion = (await stub.Generate(request)).completions[0]
    assert completion.rateable
    found = await logged(stub, completion.completion_id)
    assert (found.prompt_text, found.completion.text) == ("", "")
    assert not found.completion.token_ids
    assert not found.prompt_token_ids
    assert found.completion.usage.completion_tokens == 4
    assert "canary" not in dump(config)


def dump(config) -> str:
    with sqlite3.connect(config.home / "heedful.db") as connection:
        return "\n".join(connection.iterdump())


async def test_no_consent_and_rollouts_leave_no_trace(stub, config):
    none = pb.Consent(log=pb.LOG_CONSENT_NONE)
    for fields in ({"consent": none}, {"purpose": pb.PURPOSE_ROLLOUT}):
        answer = await stub.Generate(ask("canary", end_user="canary-user", **fields))
        assert not answer.completions[0].rateable
        assert answer.completions[0].completion_token == ""
        head, *_, last = [
            message
            async for message in stub.GenerateStream(
                pb.GenerateStreamRequest(request=ask("canary", end_user="canary-user", **fields))
            )
        ]
        assert not head.head.completions[0].rateable
        assert head.head.completions[0].completion_token == ""
        assert not last.delta.HasField("rateable")
    assert "canary" not in dump(config)


@pytest.mark.parametrize(
    ("server", "asked", "kept"),
    [
        ("metadata", pb.LOG_CONSENT_FULL, pb.LOG_CONSENT_METADATA),
        ("full", pb.LOG_CONSENT_METADATA, pb.LOG_CONSENT_METADATA),
        ("full", pb.LOG_CONSENT_UNSPECIFIED, pb.LOG_CONSENT_FULL),
    ],
)
async def test_a_request_can_only_narrow(config, start, server, asked, kept):
    _, stub, _ = await start(changed(config, consent_log=server, consent_train="no"))
    consent = pb.Consent(log=asked, train=pb.TRAIN_CONSENT_YES)
    completion = (await stub.Generate(ask(consent=consent))).completions[0]
    found = await logged(stub, completion.completion_id)
    assert found.consent == pb.Consent(log=kept, train=pb.TRAIN_CONSENT_NO)


async def test_the_row_is_there_when_the_last_message_is(stub):
    call = stub.GenerateStream(pb.GenerateStreamRequest(request=ask(n=3)))
    heads, ended = {}, 0
    async for message in call:
        if message.WhichOneof("event") == "head":
            heads = {head.index: head for head in message.head.completions}
            assert all(head.rateable and head.completion_token for head in heads.values())
        elif message.delta.finish_reason:
            assert not message.delta.HasField("rateable")
            found = await logged(stub, heads[message.delta.index].completion_id)
            assert found.completion.finish_reason == message.delta.finish_reason
            ended += 1
    assert ended == 3


async def test_a_cancelled_stream_has_its_row_and_can_be_rated(stub, engine, submit, said):
    engine.step_s = 0.01
    request = ask("abcdef", max_tokens=200)
    call = stub.GenerateStream(pb.GenerateStreamRequest(request=request))
    head = (await call.read()).head.completions[0]
    await call.read()
    # In the middle of the stream the answer is known by its token only.
    receipt = await submit(said(head))
    assert receipt.status == fb.RECEIPT_STATUS_PENDING
    call.cancel()
    found = await logged_soon(stub, head.completion_id)
    assert found.completion.finish_reason == pb.FINISH_REASON_CANCELLED
    assert "abcdef".startswith(found.completion.text[:6])
    assert len(found.completion.token_ids) == len(found.completion.text) > 0
    assert (await submit(said(head, rating=fb.Rating(value=2)))).status == fb.RECEIPT_STATUS_STORED


async def test_a_pending_judgement_is_let_go_when_its_answer_is_logged(
    stub, engine, submit, said, feedback_stub
):
    engine.step_s = 0.01
    call = stub.GenerateStream(pb.GenerateStreamRequest(request=ask(max_tokens=20)))
    event = said((await call.read()).head.completions[0])
    assert (await submit(event)).status == fb.RECEIPT_STATUS_PENDING
    get = fb.GetFeedbackRequest(feedback_id=event.feedback_id)
    assert (await feedback_stub.GetFeedback(get)).record.fate.kind == fb.FATE_KIND_PENDING
    await drain(call)
    record = (await feedback_stub.GetFeedback(get)).record
    assert (record.fate.kind, record.current) == (fb.FATE_KIND_WAITING, True)


async def test_an_answer_cut_by_its_deadline_has_its_row(stub, engine):
    engine.step_s = 0.01
    answer = await stub.Generate(ask(max_tokens=250), timeout=0.4)
    completion = answer.completions[0]
    assert completion.finish_reason == pb.FINISH_REASON_DEADLINE
    found = await logged(stub, completion.completion_id)
    assert found.completion.finish_reason == pb.FINISH_REASON_DEADLINE
    assert found.completion.text == completion.text


async def test_an_answer_that_the_engine_lost_has_its_row(stub, engine):
    engine.step_s = 0.01
    call = stub.GenerateStream(pb.GenerateStreamRequest(request=ask(max_tokens=200)))
    head = (await call.read()).head.completions[0]
    await call.read()
    engine.die()
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(drain(call), 5)
    found = await logged_soon(stub, head.completion_id)
    assert found.completion.finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert found.completion.text


async def drain(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_locked_store_leaves_the_answer_intact_and_unrateable(config, start):
    server, stub, feedback_stub = await start(changed(config, log_timeout_s=0.2))
    with sqlite3.connect(config.home / "heedful.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        completion = (await stub.Generate(ask())).completions[0]
        assert loop.time() - started_s < 1.5
        assert completion.text == "hell"
        assert (completion.rateable, completion.completion_token) == (False, "")
        stream = pb.GenerateStreamRequest(request=ask())
        *_, last = [message async for message in stub.GenerateStream(stream)]
        assert last.delta.HasField("rateable")
        assert not last.delta.rateable
        value = server.metrics.registry.get_sample_value
        assert value("heedful_completions_unlogged_total", {"reason": "timeout"}) == 2
        other.execute("ROLLBACK")
    event = fb.FeedbackEvent(
        feedback_id=uuid7(), completion_id=completion.completion_id, thumb=fb.Thumb(up=True)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await feedback_stub.SubmitFeedback(fb.SubmitFeedbackRequest(event=event))
    assert caught.value.code() is S.FAILED_PRECONDITION
    assert (await stub.Generate(ask())).completions[0].rateable, "the store recovers"


async def test_a_dead_store_is_reported_and_generation_goes_on(config, start, monkeypatch):
    monkeypatch.setenv("HEEDFUL_FAILPOINTS", "after_commit=2:raise")
    server, stub, feedback_stub = await start(config)
    good = bad = None
    while bad is None:
        completion = (await stub.Generate(ask())).completions[0]
        good, bad = (completion, None) if completion.rateable else (good, completion)
    assert bad.text == "hell"
    assert server.feedback.store.death
    head = await stub.GenerateStream(pb.GenerateStreamRequest(request=ask())).read()
    assert not head.head.completions[0].rateable
    event = fb.FeedbackEvent(
        feedback_id=uuid7(), completion_id=uuid7(), rating=fb.Rating(value=1), rater_id="r"
    )
    request = fb.SubmitFeedbackRequest(event=event)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await feedback_stub.SubmitFeedback(request)
    assert caught.value.code() is S.UNAVAILABLE
    server._update_health()
    assert server._health._statuses["heedful.v1.FeedbackService"] == 2
    assert server.metrics.registry.get_sample_value("heedful_store_up") == 0


async def test_short_of_space_answers_are_not_logged_but_feedback_is(config, start):
    server, stub, feedback_stub = await start(config)
    rated = (await stub.Generate(ask())).completions[0]
    server.feedback.upkeep._watermark_bytes = 1 << 62
    server.feedback.upkeep.check_disk()
    completion = (await stub.Generate(ask())).completions[0]
    assert (completion.rateable, completion.text) == (False, "hell")
    event = fb.FeedbackEvent(
        feedback_id=uuid7(), completion_id=rated.completion_id, thumb=fb.Thumb(up=True)
    )
    await feedback_stub.SubmitFeedback(fb.SubmitFeedbackRequest(event=event))
    server.feedback.upkeep._watermark_bytes = 0
    server.feedback.upkeep.check_disk()
    assert (await stub.Generate(ask())).completions[0].rateable


async def test_retention_removes_the_content_of_unrated_answers(config, start, monkeypatch, said):
    server, stub, feedback_stub = await start(changed(config, retention_days=30))
    rated, unrated = (await stub.Generate(ask("canary", n=2))).completions
    await feedback_stub.SubmitFeedback(fb.SubmitFeedbackRequest(event=said(rated)))
    now_ms = upkeep.now_ms()
    monkeypatch.setattr(upkeep, "now_ms", lambda: now_ms + 31 * 86_400_000)
    await server.feedback.upkeep.tidy()
    assert (await logged(stub, rated.completion_id)).prompt_text == "canary"
    assert (await logged(stub, unrated.completion_id)).prompt_text == ""
    value = server.metrics.registry.get_sample_value
    assert value("heedful_completions_pruned_total") == 1
    assert value("heedful_feedback_log_events", {"state": "current"}) == 1
    assert value("heedful_feedback_backlog") == 1


async def test_events_are_counted_by_kind_tier_and_status(stub, submit, said, server):
    completion = (await stub.Generate(ask())).completions[0]
    event = said(completion)
    await submit(event)
    await submit(event)
    with pytest.raises(grpc.aio.AioRpcError):
        await submit(said(completion, completion_token="no"))
    value = server.metrics.registry.get_sample_value
    labels = {"kind": "thumb", "tier": "operator"}
    assert value("heedful_feedback_events_total", labels | {"status": "stored"}) == 1
    assert value("heedful_feedback_events_total", labels | {"status": "duplicate"}) == 1
    assert value("heedful_feedback_refused_total", {"reason": "InvalidRequest"}) == 1
    assert value("heedful_completions_logged_total", {"consent": "full"}) == 1
    assert value("heedful_store_commit_seconds_count") >= 3
    assert value("heedful_store_group_items_count") >= 3
    assert value("heedful_store_up") == 1


@pytest.mark.parametrize(
    "url", ["mysql://localhost/x", "sqlite://", "nonsense", "sqlite:////proc/nowhere/x.db"]
)
def test_a_store_that_cannot_be_opened_is_an_error_of_the_start(config, model, make_engine, url):
    with pytest.raises(StartupError, match=r"feedback\.store_url"):
        Server(changed(config, store_url=url), model, make_engine)


def test_a_file_that_is_no_database_is_an_error_of_the_start(config, model, make_engine):
    (Path(config.home) / "heedful.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StartupError, match=r"feedback\.store_url"):
        Server(config, model, make_engine)

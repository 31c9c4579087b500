"""Judgements over a real port: every kind, retries, edits, retractions, refusals, batches."""

import asyncio

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_server.engine_client.client import EngineState
from heedful_server.errors import InvalidRequest
from heedful_server.feedback.desk import FeedbackDesk
from heedful_server.identity import FEEDBACK_OWN, Caller
from heedful_server.rpc.feedback_rules import submission
from heedful_store import NotFound, Scope, uuid7

S = grpc.StatusCode
KINDS = {
    "thumb": pb.Thumb(up=False, reasons=["wrong", "too long"]),
    "rating": pb.Rating(value=7),
    "correction": pb.Correction(text="better \u00e9"),
    "critique": pb.Critique(text="too stiff", aspects=["tone"]),
    "label": pb.Label(hallucination=True, expresses_moral_judgment=False),
}


async def record_of(feedback_stub, feedback_id: str, **fields: str) -> pb.FeedbackRecord:
    request = pb.GetFeedbackRequest(feedback_id=feedback_id, **fields)
    return (await feedback_stub.GetFeedback(request)).record


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_is_stored_and_comes_back_whole(
    generate, submit, said, feedback_stub, kind
):
    completion = (await generate(end_user="ann")).completions[0]
    assert completion.rateable
    time = Timestamp(seconds=1_700_000_000, nanos=5_000_000)
    event = said(completion, tags=["beta"], client_time=time, **{kind: KINDS[kind]})
    receipt = await submit(event)
    assert receipt.status == pb.RECEIPT_STATUS_STORED
    assert receipt.seq > 0
    record = await record_of(feedback_stub, event.feedback_id)
    assert record.event.WhichOneof("kind") == kind
    assert getattr(record.event, kind) == KINDS[kind]
    assert (record.event.rater_id, record.event.rater_kind) == ("ann", pb.RATER_KIND_END_USER)
    assert (record.event.client_time, list(record.event.tags)) == (time, ["beta"])
    assert record.event.completion_token == ""
    assert (record.policy_version, record.current) == ("base", True)
    assert record.fate.kind == pb.FATE_KIND_WAITING


async def test_a_retry_gives_the_same_receipt_and_another_payload_clashes(generate, submit, said):
    completion = (await generate()).completions[0]
    event = said(completion)
    first, second = await submit(event), await submit(event)
    assert second.status == pb.RECEIPT_STATUS_DUPLICATE
    assert (second.seq, second.server_time) == (first.seq, first.server_time)
    event.thumb.up = False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(event)
    assert caught.value.code() is S.ALREADY_EXISTS


async def test_concurrent_retries_are_one_event(generate, submit, said):
    event = said((await generate()).completions[0])
    receipts = await asyncio.gather(*(submit(event) for _ in range(20)))
    assert len({receipt.seq for receipt in receipts}) == 1
    stored = [receipt for receipt in receipts if receipt.status == pb.RECEIPT_STATUS_STORED]
    assert len(stored) == 1


async def test_an_edit_supersedes_and_a_retraction_takes_back_for_good(
    generate, submit, said, feedback_stub
):
    completion = (await generate()).completions[0]
    first = said(completion)
    await submit(first)
    edit = said(completion, thumb=pb.Thumb(up=False), supersedes_id=first.feedback_id)
    await submit(edit)
    old = await record_of(feedback_stub, first.feedback_id)
    assert (old.fate.kind, old.current) == (pb.FATE_KIND_SUPERSEDED, False)
    assert (await record_of(feedback_stub, edit.feedback_id)).current
    retraction = pb.RetractFeedbackRequest(
        retraction_id=uuid7(), feedback_id=edit.feedback_id, token=completion.completion_token
    )
    receipt = (await feedback_stub.RetractFeedback(retraction)).receipt
    assert receipt.status == pb.RECEIPT_STATUS_STORED
    again = (await feedback_stub.RetractFeedback(retraction)).receipt
    assert (again.status, again.seq) == (pb.RECEIPT_STATUS_DUPLICATE, receipt.seq)
    gone = await record_of(feedback_stub, edit.feedback_id)
    assert (gone.fate.kind, gone.current) == (pb.FATE_KIND_RETRACTED, False)
    tombstone = await record_of(feedback_stub, retraction.retraction_id)
    assert tombstone.retracts_id == edit.feedback_id
    assert not tombstone.current


async def test_what_may_not_be_trained_on_is_excluded_and_says_so(
    generate, submit, said, feedback_stub
):
    consent = inference_pb2.Consent(train=inference_pb2.TRAIN_CONSENT_NO)
    refused_by_user = (await generate(consent=consent)).completions[0]
    willing = (await generate()).completions[0]
    metadata_only = inference_pb2.Consent(log=inference_pb2.LOG_CONSENT_METADATA)
    without_text = (await generate(consent=metadata_only)).completions[0]
    events = [
        said(refused_by_user),
        said(willing, train=inference_pb2.TRAIN_CONSENT_NO),
        said(without_text),
        said(willing, rater_kind=pb.RATER_KIND_JUDGE, rater_id="bot"),
    ]
    reasons = []
    for event in events:
        await submit(event)
        fate = (await record_of(feedback_stub, event.feedback_id)).fate
        assert fate.kind == pb.FATE_KIND_EXCLUDED
        reasons.append(fate.reason)
    assert reasons == ["no consent", "no consent", "no consent", "given by a model"]


ID = uuid7()
BAD = {
    "feedback_id": {"feedback_id": "7"},
    "completion_id": {"completion_id": "7"},
    "comparison_id": {"comparison_id": ID},
    "completion_token": {"completion_token": "v1.forged.token"},
    "rating.value": {"rating": pb.Rating(value=8)},
    "thumb.reasons[1]": {"thumb": pb.Thumb(reasons=["ok", "x" * 65])},
    "thumb.reasons": {"thumb": pb.Thumb(reasons=["x"] * 17)},
    "correction.text": {"correction": pb.Correction(text=" \n")},
    "critique.text": {"critique": pb.Critique(text="x" * 1024 * 1024)},
    "critique.aspects[0]": {"critique": pb.Critique(text="x", aspects=[""])},
    "label": {"label": pb.Label()},
    "supersedes_id": {"supersedes_id": "x"},
    "rater_kind": {"rater_kind": 99},
    "rater_id": {"rater_id": "x" * 129},
    "tags": {"tags": ["x"] * 17},
    "client_time": {"client_time": Timestamp(seconds=1 << 60)},
    "train": {"train": 9},
}


@pytest.mark.parametrize("field", BAD)
async def test_a_bad_field_is_named_and_nothing_is_stored(
    generate, submit, said, feedback_stub, violation, field
):
    event = said((await generate()).completions[0], **BAD[field])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(event)
    assert violation(caught.value)[0] == f"event.{field}"
    assert not (await feedback_stub.ListFeedback(pb.ListFeedbackRequest())).records


async def test_an_event_without_a_kind_and_a_rating_of_zero_are_refused(
    generate, submit, said, violation
):
    completion = (await generate()).completions[0]
    event = said(completion)
    event.ClearField("thumb")
    for bad, field in [(event, "event.kind"), (said(completion, rating=pb.Rating()), None)]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await submit(bad)
        assert violation(caught.value)[0] == (field or "event.rating.value")


async def test_a_clock_far_off_is_kept_and_orders_nothing(generate, submit, said, feedback_stub):
    completion = (await generate()).completions[0]
    late = said(completion, client_time=Timestamp(seconds=253_402_300_799))
    early = said(completion, thumb=pb.Thumb(up=False), client_time=Timestamp(seconds=-1))
    await submit(late)
    await submit(early)
    assert not (await record_of(feedback_stub, late.feedback_id)).current
    record = await record_of(feedback_stub, early.feedback_id)
    assert record.current
    assert record.event.client_time.seconds == -1


async def test_unknown_and_foreign_ids_look_the_same(generate, submit, said, server, feedback_stub):
    completion = (await generate()).completions[0]
    unknown = said(completion, completion_id=uuid7(), completion_token="")
    foreign = said(completion)
    foreign.completion_token = server.feedback.tokens.sign(
        "completion", completion.completion_id, tenant="other", project="default", end_user=""
    )
    messages = set()
    for event in (unknown, foreign):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await submit(event)
        assert caught.value.code() is S.NOT_FOUND
        messages.add(caught.value.details())
    assert len(messages) == 1
    for call in (
        feedback_stub.GetFeedback(pb.GetFeedbackRequest(feedback_id=uuid7())),
        feedback_stub.RetractFeedback(
            pb.RetractFeedbackRequest(feedback_id=uuid7(), retraction_id=uuid7())
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is S.NOT_FOUND


async def test_an_unlogged_answer_cannot_be_rated(generate, submit, said):
    consent = inference_pb2.Consent(log=inference_pb2.LOG_CONSENT_NONE)
    completion = (await generate(consent=consent)).completions[0]
    assert (completion.rateable, completion.completion_token) == (False, "")
    with pytest.raises(grpc.aio.AioRpcError, match="not logged") as caught:
        await submit(said(completion))
    assert caught.value.code() is S.FAILED_PRECONDITION


async def test_each_item_of_a_batch_has_its_own_outcome(generate, said, feedback_stub):
    completion = (await generate()).completions[0]
    good = said(completion)
    edit = said(completion, thumb=pb.Thumb(), supersedes_id=good.feedback_id)
    events = [
        good,
        said(completion, rating=pb.Rating(value=9)),
        edit,
        said(completion, completion_id=uuid7(), completion_token=""),
        good,
    ]
    response = await feedback_stub.SubmitFeedbackBatch(pb.SubmitFeedbackBatchRequest(events=events))
    outcomes = [item.WhichOneof("outcome") for item in response.items]
    assert outcomes == ["receipt", "error", "receipt", "error", "receipt"]
    bad, unknown = response.items[1].error, response.items[3].error
    assert (bad.code, bad.field) == (S.INVALID_ARGUMENT.value[0], "events[1].rating.value")
    assert unknown.code == S.NOT_FOUND.value[0]
    assert response.items[4].receipt.status == pb.RECEIPT_STATUS_DUPLICATE
    assert response.items[4].receipt.seq == response.items[0].receipt.seq


@pytest.mark.parametrize("count", [0, 1001])
async def test_a_batch_out_of_bounds_is_refused(feedback_stub, violation, count):
    events = [pb.FeedbackEvent()] * count
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await feedback_stub.SubmitFeedbackBatch(pb.SubmitFeedbackBatchRequest(events=events))
    assert violation(caught.value)[0] == "events"


async def test_feedback_is_taken_while_the_engine_loads(generate, submit, said, engine):
    completion = (await generate()).completions[0]
    engine.become(EngineState.RESTARTING)
    assert (await submit(said(completion))).status == pb.RECEIPT_STATUS_STORED


@pytest.fixture
def desk(server) -> FeedbackDesk:
    parts = server.feedback
    metrics = server.metrics.feedback
    return FeedbackDesk(parts.store, parts.tokens, parts.recent, metrics, "public")


OWN = Caller("local", "key", frozenset({FEEDBACK_OWN}))
SCOPE = Scope("local", "default")


def own(event: pb.FeedbackEvent):
    return submission(event, "event.", SCOPE, "rpc", "key")


async def test_with_a_token_an_end_user_may_rate_just_that_answer(generate, said, desk):
    mine, other = (await generate(end_user="ann", n=2)).completions
    receipt = await desk.submit(OWN, own(said(mine)))
    assert not receipt.duplicate
    with pytest.raises(InvalidRequest, match="completion_token"):
        await desk.submit(OWN, own(said(mine, completion_token="")))
    with pytest.raises(NotFound):
        await desk.submit(OWN, own(said(mine, completion_token=other.completion_token)))


@pytest.mark.parametrize(
    ("field", "value"), [("rater_id", "bob"), ("rater_kind", pb.RATER_KIND_OPERATOR)]
)
async def test_an_end_user_speaks_for_nobody_else(generate, said, desk, field, value):
    completion = (await generate(end_user="ann")).completions[0]
    with pytest.raises(InvalidRequest, match=f"event.{field}"):
        await desk.submit(OWN, own(said(completion, **{field: value})))


async def test_an_end_user_ranks_only_what_was_compared(generate, said, desk):
    one, two = (await generate(n=2)).completions
    groups = [pb.RankingGroup(completion_ids=[c.completion_id]) for c in (one, two)]
    event = pb.FeedbackEvent(feedback_id=uuid7(), ranking=pb.Ranking(groups=groups))
    with pytest.raises(InvalidRequest, match="comparison_id"):
        await desk.submit(OWN, own(event))

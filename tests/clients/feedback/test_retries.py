"""A judgement is recorded once, however often it has to be sent."""

import time
import uuid

import grpc
import heedful
import pytest
from heedful import DeadlineExceeded, Event, ImportItem, QueueFull, ReceiptStatus, Thumb
from heedful import feedback_calls as calls
from heedful.ids import IdSource
from heedful_proto.v1 import feedback_pb2 as pb

Code = grpc.StatusCode


def sent(memory) -> list[bytes]:
    return [request.SerializeToString() for request in memory.requests]


async def test_a_lost_answer_is_asked_for_again_with_the_same_id(client, memory, completion):
    memory.lost_answers = 2
    receipt = await client.rate(completion, reasons=["a"])
    assert receipt.status is ReceiptStatus.DUPLICATE
    assert receipt.seq == 1
    assert len(memory.records) == 1
    assert len(memory.requests) == 3
    assert len(set(sent(memory))) == 1


async def test_an_answer_that_does_not_come_is_asked_for_again(
    client, memory, completion, monkeypatch
):
    monkeypatch.setattr(calls, "ATTEMPT_TIMEOUT_S", 0.2)
    memory.hanging_answers = 1
    receipt = await client.rate(completion)
    assert receipt.status is ReceiptStatus.DUPLICATE
    assert len(set(sent(memory))) == 1
    assert len(memory.records) == 1


async def test_the_timeout_of_the_call_bounds_all_attempts(client, memory, completion, monkeypatch):
    monkeypatch.setattr(calls, "ATTEMPT_TIMEOUT_S", 0.2)
    memory.hanging_answers = 10
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.rate(completion, timeout_s=0.7)
    assert time.monotonic() - started_s < 2
    assert len(memory.records) == 1


async def test_a_full_store_is_tried_again_after_the_time_it_names(
    client, script, memory, refusal, completion
):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "full", retry_after_s=0.2)]
    started_s = time.monotonic()
    receipt = await client.rate(completion)
    assert receipt.status is ReceiptStatus.STORED
    assert time.monotonic() - started_s >= 0.2
    assert len(set(sent(memory))) == 1


async def test_a_quota_without_a_time_is_not_tried_again(
    client, script, memory, refusal, completion
):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "quota")]
    with pytest.raises(QueueFull):
        await client.rate(completion)
    assert len(memory.requests) == 1


@pytest.mark.parametrize(
    "code", [Code.INVALID_ARGUMENT, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.INTERNAL]
)
async def test_a_refusal_is_final(client, script, memory, refusal, completion, code):
    script.refusals = [refusal(code, "no")]
    with pytest.raises(heedful.HeedfulError):
        await client.rate(completion)
    assert len(memory.requests) == 1


async def test_batches_retractions_and_imports_are_repeated_too(client, memory, completion):
    memory.lost_answers = 1
    (outcome,) = await client.submit([Event(Thumb(True), "id-0")])
    assert outcome.status is ReceiptStatus.DUPLICATE
    memory.lost_answers = 1
    tombstone = await client.retract(outcome)
    assert tombstone.status is ReceiptStatus.DUPLICATE
    memory.lost_answers = 1
    (imported,) = await client.import_feedback([ImportItem("1", "p", ("c",), Thumb(True))])
    assert imported.status is ReceiptStatus.DUPLICATE
    assert len(memory.requests) == 6
    assert len(set(sent(memory))) == 3


async def test_the_same_id_given_twice_is_one_judgement(client, memory, completion):
    name = IdSource().next()
    first = await client.rate(completion, feedback_id=name)
    again = await client.rate(completion, feedback_id=name)
    assert (first.seq, again.seq) == (1, 1)
    assert again.status is ReceiptStatus.DUPLICATE
    with pytest.raises(heedful.AlreadyExists):
        await client.rate(completion, False, feedback_id=name)
    (record,) = memory.records.values()
    assert record.event.thumb.up


async def test_a_comparison_that_may_have_begun_is_not_repeated(client, script, memory, refusal):
    script.refusals = [refusal(Code.UNAVAILABLE, "engine died")]
    with pytest.raises(heedful.Unavailable):
        await client.compare("x")
    assert len(memory.requests) == 1


async def test_an_erasure_whose_answer_was_lost_is_not_repeated(client, script, memory, refusal):
    script.refusals = [refusal(Code.UNAVAILABLE, "connection lost")]
    with pytest.raises(heedful.Unavailable):
        await client.erase_user("ann")
    assert len(memory.requests) == 1


async def test_an_export_is_tried_again_only_before_its_first_event(
    client, script, memory, refusal, completion
):
    for _ in range(3):
        await client.rate(completion)
    script.refusals = [refusal(Code.UNAVAILABLE, "loading")]
    assert len([item async for item in client.export_feedback()]) == 3
    memory.fail_export_after = 2
    exported = client.export_feedback()
    assert [(await anext(exported)).record.receipt.seq for _ in range(2)] == [1, 2]
    with pytest.raises(heedful.Unavailable):
        await anext(exported)
    assert len(memory.of(pb.ExportFeedbackRequest)) == 3


async def test_a_server_that_starts_later_gets_the_judgement(server, memory, completion):
    server.stop()
    async with heedful.AsyncClient(server.target, max_attempts=20) as client:
        with pytest.raises(heedful.NotConnected):
            await client.rate(completion, timeout_s=0.3)
    server.start()
    async with heedful.AsyncClient(server.target) as client:
        assert (await client.rate(completion)).status is ReceiptStatus.STORED


def test_ids_are_uuid7_and_grow_strictly():
    source = IdSource()
    before_ms = time.time_ns() // 1_000_000
    ids = [source.next() for _ in range(5000)]
    after_ms = time.time_ns() // 1_000_000
    assert sorted(ids) == ids
    assert len(set(ids)) == len(ids)
    parsed = [uuid.UUID(text) for text in (ids[0], ids[-1])]
    assert all(item.version == 7 and item.variant == uuid.RFC_4122 for item in parsed)
    assert before_ms <= parsed[0].int >> 80 <= after_ms + 1


def test_ids_grow_while_the_clock_stands_still_or_goes_back(monkeypatch):
    source = IdSource()
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)
    ids = [source.next() for _ in range(5000)]
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    ids += [source.next() for _ in range(5)]
    assert sorted(ids) == ids
    assert len(set(ids)) == len(ids)

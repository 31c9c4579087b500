"""The synchronous client judges, lists and exports as the asynchronous one does."""

import gc
import threading

import heedful
import pytest
from heedful import Client
from heedful_proto.v1 import feedback_pb2 as pb


@pytest.fixture
def client(server, memory):
    with Client(server.target, timeout_s=10) as client:
        yield client


def test_a_judgement_from_rating_to_taking_it_back(client):
    completion = client.generate("hello").completions[0]
    receipt = client.rate(completion, up=False, reasons=["dull"])
    assert client.feedback(receipt).event.judgement == heedful.Thumb(False, ("dull",))
    client.retract(receipt)
    assert client.feedback(receipt).fate.kind is heedful.FateKind.RETRACTED
    assert client.completion(completion).completion.text == "hello"


def test_a_comparison_is_ranked(client):
    comparison = client.compare("which", k=4)
    client.rank(comparison, [3, 2, 1, 0])
    assert client.next_question().comparison is None
    assert client.summarize_feedback().events_by_kind == {"ranking": 1}


def test_the_iterators_yield_what_the_asynchronous_ones_do(client, memory):
    completion = client.generate("hello").completions[0]
    for value in range(1, 8):
        client.grade(completion, value)
    listed = list(client.list_feedback(page_size=2))
    exported = list(client.export_feedback(include_completions=True))
    assert [record.event.judgement.value for record in listed] == list(range(1, 8))
    assert [item.record for item in exported] == listed
    assert len(memory.of(pb.ListFeedbackRequest)) == 4


def test_leaving_an_iteration_early_leaves_nothing_behind(client, recwarn):
    completion = client.generate("hello").completions[0]
    for value in range(1, 8):
        client.grade(completion, value)
    assert next(iter(client.export_feedback())).record.receipt.seq == 1
    for record in client.list_feedback(page_size=2):
        assert record.receipt.seq == 1
        break
    gc.collect()
    assert len(list(client.export_feedback())) == 7
    assert not recwarn.list


def test_an_iteration_that_outlives_its_client_ends(server, memory):
    with Client(server.target) as client:
        completion = client.generate("hello").completions[0]
        client.rate(completion)
        client.rate(completion)
        found = client.export_feedback()
        next(found)
    with pytest.raises(RuntimeError, match="closed"):
        next(found)
    assert all(thread.name != "heedful-client" for thread in threading.enumerate())


def test_errors_come_through_an_iteration(client, memory):
    completion = client.generate("hello").completions[0]
    client.rate(completion)
    client.rate(completion)
    memory.fail_export_after = 1
    found = client.export_feedback()
    next(found)
    with pytest.raises(heedful.Unavailable):
        next(found)


def test_many_threads_judge_through_one_client(client, memory):
    completion = client.generate("hello").completions[0]
    threads = [threading.Thread(target=client.rate, args=(completion,)) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory.records) == 32

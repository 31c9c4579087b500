"""What the client sends about completions, and what it makes of the replies."""

from datetime import UTC, datetime

import heedful
import pytest
from heedful import (
    AsyncClient,
    Comparison,
    Correction,
    Critique,
    Event,
    FateKind,
    ImportItem,
    InvalidRequest,
    Label,
    Ranking,
    Rating,
    ReceiptStatus,
    Thumb,
)
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2


async def test_a_completion_is_all_that_rating_it_needs(client, memory, completion):
    receipt = await client.rate(completion)
    event = memory.of(pb.SubmitFeedbackRequest)[0].event
    assert (event.completion_id, event.completion_token) == ("id-0", "token-0")
    assert event.thumb.up
    assert receipt.feedback_id == event.feedback_id
    assert (receipt.seq, receipt.status) == (1, ReceiptStatus.STORED)
    assert receipt.server_time == datetime(1970, 1, 1, tzinfo=UTC)


async def test_a_streamed_completion_can_be_rated_too(client, memory):
    stream = client.stream("hi")
    async for _ in stream:
        pass
    await client.rate(stream.generation.completions[0], up=False, reasons=["wrong", "too long"])
    event = memory.events[0]
    assert not event.thumb.up
    assert list(event.thumb.reasons) == ["wrong", "too long"]


async def test_every_kind_of_judgement_reaches_the_log(client, memory, completion):
    await client.grade(completion, 6)
    await client.correct(completion, "better")
    await client.critique(completion, "rude", aspects=["tone"])
    await client.label(completion, hallucination=True, harmful_advice=False)
    grade, correction, critique, label = memory.events
    assert grade.rating.value == 6
    assert correction.correction.text == "better"
    assert (critique.critique.text, list(critique.critique.aspects)) == ("rude", ["tone"])
    said = {field.name: value for field, value in label.label.ListFields()}
    assert said == {"hallucination": True, "harmful_advice": False}


async def test_every_option_reaches_the_wire(client, memory, completion):
    first = await client.rate(completion)
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    await client.rate(
        completion,
        feedback_id="0190b8a0-0000-7000-8000-000000000001",
        supersedes=first,
        rater_id="bob",
        rater_kind="expert",
        tags=["a", "b"],
        train=False,
        client_time=when,
        timeout_s=5,
    )
    event = memory.events[1]
    assert event.feedback_id == "0190b8a0-0000-7000-8000-000000000001"
    assert event.supersedes_id == first.feedback_id
    assert (event.rater_id, event.rater_kind) == ("bob", pb.RATER_KIND_EXPERT)
    assert list(event.tags) == ["a", "b"]
    assert event.train == inference_pb2.TRAIN_CONSENT_NO
    assert event.client_time.ToDatetime(UTC) == when


async def test_the_project_of_the_client_is_sent_with_every_call(server, memory):
    async with AsyncClient(server.target, project="shop") as client:
        comparison = await client.compare("x")
        receipt = await client.rank(comparison, [0, 1])
        await client.feedback(receipt)
        await client.retract(receipt)
        await client.next_question()
        await client.submit([Event(Thumb(True), "nobody")])
        await client.import_feedback([ImportItem("i", "p", ("c",), Thumb(True))])
        await client.summarize_feedback()
        await client.erase_user("ann")
        assert [record async for record in client.list_feedback()]
        assert [item async for item in client.export_feedback()]
    assert len(memory.requests) == 11
    assert {request.project for request in memory.requests} == {"shop"}


async def test_an_id_and_its_token_are_enough_weeks_later(client, memory, completion):
    await client.rate("id-0", token="token-0")
    with pytest.raises(InvalidRequest) as caught:
        await client.rate("id-0", token="forged")
    assert caught.value.field == "event.completion_token"
    assert len(memory.records) == 1


async def test_what_cannot_be_judged_is_refused_before_anything_is_sent(client, memory, completion):
    with pytest.raises(TypeError, match="not int"):
        await client.rate(3)
    with pytest.raises(InvalidRequest, match="completion_id"):
        await client.rate("")
    with pytest.raises(TypeError, match="did you mean 'rater_id'"):
        await client.rate(completion, rater="bob")
    with pytest.raises(TypeError, match="did you mean 'hallucination'"):
        await client.label(completion, halucination=True)
    with pytest.raises(TypeError, match="not a str"):
        await client.rate(completion, reasons="wrong")
    with pytest.raises(InvalidRequest, match="rater_kind"):
        await client.rate(completion, rater_kind="robot")
    with pytest.raises(InvalidRequest, match=r"rating\.value"):
        await client.grade(completion, -1)
    with pytest.raises(InvalidRequest, match=r"correction\.text"):
        await client.correct(completion, "\ud800")
    assert memory.requests == []


async def test_what_the_server_refuses_names_the_field(client, completion):
    with pytest.raises(InvalidRequest) as caught:
        await client.grade(completion, 8)
    assert caught.value.field == "event.rating.value"
    with pytest.raises(heedful.NotFound):
        await client.rate("nobody's")


async def test_a_comparison_is_blind_and_ranked_by_position(client, memory):
    comparison = await client.compare("which", k=3, temperature=0.5, end_user="ann")
    assert [item.text for item in comparison.candidates] == ["which 0", "which 1", "which 2"]
    assert not hasattr(comparison.candidates[0], "policy_version")
    await client.rank(comparison, [2, [0, 1]])
    event = memory.of(pb.SubmitFeedbackRequest)[0].event
    assert (event.comparison_id, event.comparison_token) == ("cmp-0", "cmp-token-0")
    groups = [list(group.completion_ids) for group in event.ranking.groups]
    assert groups == [["cand-0-2"], ["cand-0-0", "cand-0-1"]]
    request = memory.of(pb.CompareRequest)[0]
    assert (request.k, request.sampling.temperature, request.end_user) == (3, 0.5, "ann")


async def test_a_ranking_may_name_candidates_and_ids(client, memory):
    comparison = await client.compare("which", k=3)
    first, second, third = comparison.candidates
    await client.rank(comparison, [third, second.completion_id, first])
    groups = [list(group.completion_ids) for group in memory.events[0].ranking.groups]
    assert groups == [["cand-0-2"], ["cand-0-1"], ["cand-0-0"]]


async def test_completions_are_ranked_in_the_order_they_are_given(client, memory):
    one, two, three = (await client.generate("abc", n=3)).completions
    await client.rank([two, one, three])
    await client.rank([one, two, three], [three, [one, two]])
    straight, tied = (
        [list(group.completion_ids) for group in event.ranking.groups] for event in memory.events
    )
    assert straight == [["id-1"], ["id-0"], ["id-2"]]
    assert tied == [["id-2"], ["id-0", "id-1"]]
    assert memory.events[0].comparison_id == ""


async def test_all_bad_ties_everything_unless_an_order_is_given(client, memory):
    comparison = await client.compare("which")
    await client.rank(comparison, all_bad=True)
    await client.rank(comparison, [1, 0], all_bad=True)
    tied, ordered = (event.ranking for event in memory.events)
    assert tied.all_bad
    assert ordered.all_bad
    assert [list(group.completion_ids) for group in tied.groups] == [["cand-0-0", "cand-0-1"]]
    assert len(ordered.groups) == 2


async def test_rankings_that_make_no_sense_are_refused(client):
    comparison = await client.compare("which")
    with pytest.raises(InvalidRequest, match="needs an order"):
        await client.rank(comparison)
    with pytest.raises(InvalidRequest, match="position 2 of 2"):
        await client.rank(comparison, [2, 0])
    with pytest.raises(InvalidRequest, match="twice"):
        await client.rank(comparison, [0, 0])
    with pytest.raises(InvalidRequest, match="every completion shown"):
        await client.rank(comparison, [0])
    with pytest.raises(TypeError, match="not a str"):
        await client.rank("cmp-0", ["a", "b"])


async def test_every_option_of_compare_reaches_the_wire(client, memory):
    await client.compare(
        heedful.Text("x"),
        k=9,
        models=["base", "v1"],
        purpose="gate",
        priority="background",
        conversation_id="c",
        tags=["t"],
        consent=heedful.Consent(log="metadata", train=False),
        top_p=0.5,
        seed=3,
        stop="end",
        logit_bias={7: 1.0},
    )
    request = memory.of(pb.CompareRequest)[0]
    assert request.prompt.text == "x"
    assert list(request.models) == ["base", "v1"]
    assert request.purpose == pb.COMPARISON_PURPOSE_GATE
    assert request.priority == inference_pb2.PRIORITY_BACKGROUND
    assert (request.conversation_id, list(request.tags)) == ("c", ["t"])
    assert request.consent.log == inference_pb2.LOG_CONSENT_METADATA
    assert request.consent.train == inference_pb2.TRAIN_CONSENT_NO
    assert (request.sampling.top_p, request.sampling.seed) == (0.5, 3)
    assert list(request.sampling.stop) == ["end"]
    assert request.sampling.logit_bias[0].token_id == 7
    with pytest.raises(TypeError, match="unknown option 'n'"):
        await client.compare("x", n=2)


async def test_questions_are_asked_until_all_are_answered(client):
    await client.compare("first")
    await client.compare("second")
    question = await client.next_question()
    assert question.open_count == 2
    assert question.comparison.prompt_messages[0].content == "first"
    await client.rank(question.comparison, [0, 1])
    question = await client.next_question(end_user="ann")
    assert question.comparison.prompt_messages[0].content == "second"
    await client.rank(question.comparison, [0, 1])
    assert await client.next_question() == heedful.OpenQuestion(None, 0)


async def test_a_judgement_comes_back_as_it_was_said(client, completion):
    comparison = await client.compare("which")
    said = [
        Thumb(False, ("wrong",)),
        Rating(2),
        Correction("better"),
        Critique("rude", ("tone",)),
        Label(hallucination=True, inappropriate=False),
        Ranking((("cand-0-1",), ("cand-0-0",))),
    ]
    receipts = await client.submit(
        [Event(item, completion_id="id-0") for item in said[:-1]]
        + [Event(said[-1], comparison_id=comparison.comparison_id)]
    )
    records = [await client.feedback(receipt) for receipt in receipts]
    assert [record.event.judgement for record in records] == said
    kinds = ["thumb", "rating", "correction", "critique", "label", "ranking"]
    assert [record.event.kind for record in records] == kinds
    assert records[0].policy_version == "base"
    assert records[0].fate.kind is FateKind.WAITING
    assert records[0].event.completion_token == ""


async def test_fate_tells_what_became_of_a_judgement(client, memory, completion):
    receipt = await client.rate(completion)
    fate = memory.records[receipt.feedback_id].fate
    fate.kind, fate.reason = pb.FATE_KIND_USED, "because"
    fate.dataset_ids.append("d1")
    fate.trained_versions.append("v2")
    fate.promote_time.FromSeconds(0)
    found = (await client.feedback(receipt.feedback_id, token="token-0")).fate
    when = datetime(1970, 1, 1, tzinfo=UTC)
    assert found == heedful.Fate(FateKind.USED, "because", ("d1",), ("v2",), when)


async def test_receipts_carry_the_token_to_take_back_and_hide_it(client, memory, completion):
    receipt = await client.rate(completion)
    tombstone = await client.retract(receipt)
    await client.feedback(receipt)
    assert memory.of(pb.RetractFeedbackRequest)[0].token == "token-0"
    assert memory.of(pb.GetFeedbackRequest)[0].token == "token-0"
    assert "token-0" not in repr(receipt) + repr(tombstone)
    record = await client.feedback(tombstone)
    assert record.retracts_id == receipt.feedback_id
    assert record.event.judgement is None
    assert record.event.kind is None
    assert not (await client.feedback(receipt)).current


async def test_a_batch_has_an_outcome_for_each_event(client, completion):
    outcomes = await client.submit(
        [Event(Rating(5), "id-0"), Event(Rating(9), "id-0"), Event(Thumb(True), "nobody's")]
    )
    assert outcomes[0].status is ReceiptStatus.STORED
    assert isinstance(outcomes[1], InvalidRequest)
    assert outcomes[1].field == "event.rating.value"
    assert isinstance(outcomes[2], heedful.NotFound)


async def test_long_batches_are_split_and_their_order_is_kept(client, memory, completion):
    events = [Event(Thumb(up=i % 2 == 0), "id-0") for i in range(1500)]
    outcomes = await client.submit(events)
    sizes = [len(request.events) for request in memory.of(pb.SubmitFeedbackBatchRequest)]
    assert sizes == [1000, 500]
    assert [outcome.seq for outcome in outcomes] == list(range(1, 1501))
    long = [Event(Correction("x" * 700_000), "id-0")] * 4
    await client.submit(long)
    sizes = [len(request.events) for request in memory.of(pb.SubmitFeedbackBatchRequest)]
    assert sizes[2:] == [2, 2]


async def test_nothing_to_submit_sends_nothing(client, memory):
    assert await client.submit([]) == ()
    assert memory.requests == []


async def test_listing_goes_on_over_pages(client, memory, completion):
    await client.submit([Event(Thumb(True), "id-0", tags=("even",) * (i % 2)) for i in range(7)])
    seqs = [record.receipt.seq async for record in client.list_feedback(page_size=3)]
    assert seqs == list(range(1, 8))
    assert len(memory.of(pb.ListFeedbackRequest)) == 3


async def test_every_filter_reaches_the_wire(client, memory):
    criteria = {
        "completion_id": "a",
        "comparison_id": "b",
        "rater_id": "c",
        "policy_version": "d",
        "tag": "e",
        "kinds": ["thumb", "label"],
        "current_only": True,
    }
    assert [record async for record in client.list_feedback(**criteria)] == []
    assert [record async for record in client.export_feedback(after_seq=4, **criteria)] == []
    (listed,) = memory.of(pb.ListFeedbackRequest)
    (exported,) = memory.of(pb.ExportFeedbackRequest)
    assert listed.filter == exported.filter
    for name, value in criteria.items():
        assert getattr(listed.filter, name) == value
    assert exported.after_seq == 4
    with pytest.raises(TypeError, match="did you mean 'kinds'"):
        await anext(client.list_feedback(kind="thumb"))


async def test_an_export_can_go_on_where_another_ended(client, completion):
    for value in range(1, 6):
        await client.grade(completion, value)
    exported = [item async for item in client.export_feedback(after_seq=3)]
    assert [item.record.receipt.seq for item in exported] == [4, 5]
    assert exported[0].completions == ()


async def test_an_export_may_hold_the_completions(client, completion):
    await client.rate(completion)
    (item,) = [item async for item in client.export_feedback(include_completions=True)]
    assert item.completions[0].prompt_text == "hello"
    assert item.completions[0].completion.text == "hello"


async def test_a_logged_completion_says_how_it_came_about(client):
    answer = (await client.generate("hello", temperature=0.5, seed=2**60, tags=["t"])).completions[
        0
    ]
    logged = await client.completion(answer)
    assert (logged.prompt_text, logged.completion.text) == ("hello", "hello")
    assert logged.prompt_token_ids == tuple(b"hello")
    assert logged.served_by.policy_version == "base"
    assert logged.sampling == {"temperature": 0.5, "seed": 2**60}
    assert logged.created == datetime(1970, 1, 2, tzinfo=UTC)
    assert (logged.duration_s, logged.tags) == (1.5, ("t",))
    with pytest.raises(heedful.NotFound):
        await client.completion("nobody's")
    with pytest.raises(InvalidRequest):
        await client.completion("id-0", token="forged")


async def test_imports_carry_every_form_of_judgement(client, memory):
    items = [
        ImportItem("1", "p", ("good", "bad"), ((0,), (1,)), rater_id="r", tags=("t",)),
        ImportItem("2", heedful.Text("p"), ("c",), Thumb(False, ("dull",))),
        ImportItem("3", [heedful.Message("user", "p")], ("c",), heedful.Demonstration()),
    ]
    outcomes = await client.import_feedback(items, source="set")
    assert [outcome.status for outcome in outcomes] == [ReceiptStatus.STORED] * 3
    again = await client.import_feedback(items, source="set")
    assert [outcome.status for outcome in again] == [ReceiptStatus.DUPLICATE] * 3
    pair, thumb, demonstration = memory.imported.values()
    assert [list(group.positions) for group in pair.ranking.groups] == [[0], [1]]
    assert (pair.rater_id, list(pair.tags), list(pair.completions)) == ("r", ["t"], ["good", "bad"])
    assert (thumb.prompt.text, list(thumb.thumb.reasons)) == ("p", ["dull"])
    assert demonstration.WhichOneof("judgement") == "demonstration"
    assert memory.of(pb.ImportFeedbackRequest)[0].source == "set"


async def test_an_erasure_says_what_it_removed(client, memory, completion):
    await client.rate(completion)
    erased = await client.erase_user("ann")
    assert erased == heedful.Erasure(1, 1, ("v1",))
    await client.erase_user("ann", every_project=True)
    assert [request.project for request in memory.of(pb.EraseUserRequest)] == ["default", ""]


async def test_the_summary_is_typed(client, completion):
    empty = await client.summarize_feedback()
    assert empty.rater_agreement is None
    assert empty.by_version == ()
    await client.rate(completion)
    await client.rate(completion, False, ["wrong"])
    summary = await client.summarize_feedback()
    assert summary.events_by_kind == {"thumb": 2}
    assert summary.by_version == (heedful.Approval("base", 1, 1, 0.5, 0.25, 0.75),)
    assert summary.top_reasons == (heedful.ReasonCount("wrong", 1),)
    assert summary.worst_prompts == (heedful.WorstPrompt("bad\nprompt", 1, 1),)
    assert (summary.rater_agreement, summary.rater_agreement_pairs) == (0.5, 2)
    assert summary.backlog == 2


async def test_tokens_are_in_no_repr(client, completion):
    comparison = await client.compare("x")
    event = Event(Thumb(True), "id", completion_token="token-x", comparison_token="token-y")
    shown = repr(comparison) + repr(event)
    assert "token-" not in shown
    assert isinstance(comparison, Comparison)

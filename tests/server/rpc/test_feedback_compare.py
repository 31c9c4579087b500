"""Blind comparisons over a real port: draw, order, votes, what stays withheld, questions."""

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_server.errors import InvalidRequest
from heedful_server.feedback.desk import FeedbackDesk
from heedful_server.identity import FEEDBACK_OWN, Caller
from heedful_server.rpc.feedback_rules import submission
from heedful_store import NotFound, Scope, uuid7

S = grpc.StatusCode
SCOPE = Scope("local", "default")
OWN = Caller("local", "key", frozenset({FEEDBACK_OWN}))


def request(text: str = "abcd", **fields: object) -> pb.CompareRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=3)
    fields = {"prompt": inference_pb2.Prompt(text=text), "sampling": sampling} | fields
    return pb.CompareRequest(**fields)


@pytest.fixture
def compare(feedback_stub):
    async def call(**fields: object) -> pb.Comparison:
        return (await feedback_stub.Compare(request(**fields))).comparison

    return call


def vote(comparison: pb.Comparison, *groups: list[int], **fields: object) -> pb.FeedbackEvent:
    """Rank the candidates by their places on the screen."""
    shown = [candidate.completion_id for candidate in comparison.candidates]
    named = [pb.RankingGroup(completion_ids=[shown[i] for i in group]) for group in groups]
    return pb.FeedbackEvent(
        **{
            "feedback_id": uuid7(),
            "comparison_id": comparison.comparison_id,
            "comparison_token": comparison.comparison_token,
            "ranking": pb.Ranking(groups=named),
        }
        | fields
    )


async def test_a_vote_has_its_fate_and_ties_are_kept(compare, submit, feedback_stub):
    comparison = await compare(k=4, end_user="ann")
    assert sorted(c.text for c in comparison.candidates) == ["abc", "bcd", "cda", "dab"]
    event = vote(comparison, [2], [0, 3], [1])
    assert (await submit(event)).status == pb.RECEIPT_STATUS_STORED
    get = pb.GetFeedbackRequest(feedback_id=event.feedback_id)
    record = (await feedback_stub.GetFeedback(get)).record
    assert record.event.ranking == event.ranking
    assert record.event.rater_id == "ann"
    assert (record.fate.kind, record.current) == (pb.FATE_KIND_WAITING, True)


async def test_the_order_is_random_and_recorded(compare, server):
    orders = set()
    for _ in range(20):
        comparison = await compare(k=3)
        ids = [candidate.completion_id for candidate in comparison.candidates]
        row = server.feedback.store.get_comparison(SCOPE, comparison.comparison_id)
        shown = sorted(row.candidates, key=lambda candidate: candidate.position)
        assert [candidate.completion_id for candidate in shown] == ids
        assert {candidate.propensity for candidate in shown} == {1.0}
        assert row.purpose == "learn"
        orders.add(tuple(candidate.text for candidate in comparison.candidates))
    assert len(orders) > 1


async def test_version_and_log_probs_are_withheld_until_the_vote(
    compare, submit, said, stub, feedback_stub
):
    comparison = await compare()
    candidate = comparison.candidates[0]
    get = inference_pb2.GetCompletionRequest(completion_id=candidate.completion_id)
    thumb = said(candidate)
    await submit(thumb)
    read = pb.GetFeedbackRequest(feedback_id=thumb.feedback_id)
    for is_voted in (False, True):
        found = (await stub.GetCompletion(get)).completion
        assert found.completion.text == candidate.text
        assert bool(found.served_by.policy_version) is is_voted
        assert bool(found.completion.logprobs) is is_voted
        record = (await feedback_stub.GetFeedback(read)).record
        assert bool(record.policy_version) is is_voted
        await submit(vote(comparison, [0], [1]))


async def test_all_bad_needs_no_order(compare, submit, feedback_stub):
    comparison = await compare(k=3)
    event = vote(comparison, ranking=pb.Ranking(all_bad=True))
    await submit(event)
    get = pb.GetFeedbackRequest(feedback_id=event.feedback_id)
    ranking = (await feedback_stub.GetFeedback(get)).record.event.ranking
    assert ranking.all_bad
    shown = [candidate.completion_id for candidate in comparison.candidates]
    assert [list(group.completion_ids) for group in ranking.groups] == [shown]


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        ([[0], [1, 0], [2]], "event.ranking.groups[1]"),
        ([[0], [1]], "event.ranking.groups"),
        ([[0], [], [1, 2]], "event.ranking.groups[1]"),
        ([], "event.ranking.groups"),
    ],
    ids=["twice", "missing", "empty group", "nothing"],
)
async def test_a_ranking_names_each_shown_completion_once(
    compare, submit, feedback_stub, violation, groups, field
):
    comparison = await compare(k=3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(vote(comparison, *groups))
    assert violation(caught.value)[0] == field
    assert not (await feedback_stub.ListFeedback(pb.ListFeedbackRequest())).records


async def test_a_completion_that_was_not_shown_is_refused(compare, submit, violation):
    comparison, other = await compare(), await compare()
    event = vote(comparison, [0], [1])
    event.ranking.groups[1].completion_ids[0] = other.candidates[0].completion_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(event)
    assert violation(caught.value)[0] == "event.ranking.groups[1]"


async def test_unknown_comparison_and_foreign_token_look_the_same(compare, submit):
    comparison, other = await compare(), await compare()
    unknown = vote(comparison, [0], [1], comparison_id=uuid7(), comparison_token="")
    foreign = vote(comparison, [0], [1], comparison_token=other.comparison_token)
    messages = set()
    for event in (unknown, foreign):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await submit(event)
        assert caught.value.code() is S.NOT_FOUND
        messages.add(caught.value.details())
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"k": 1}, "k"),
        ({"k": 10}, "k"),
        ({"prompt": inference_pb2.Prompt()}, "prompt"),
        ({"sampling": inference_pb2.SamplingParams(temperature=0)}, "sampling.temperature"),
        ({"purpose": 9}, "purpose"),
    ],
)
async def test_a_bad_comparison_is_refused_by_field(compare, violation, fields, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await compare(**fields)
    assert violation(caught.value)[0] == field


async def test_what_is_not_possible_is_refused(compare, engine):
    no_log = inference_pb2.Consent(log=inference_pb2.LOG_CONSENT_NONE)
    for fields, code in [
        ({"purpose": pb.COMPARISON_PURPOSE_GATE}, S.FAILED_PRECONDITION),
        ({"consent": no_log}, S.FAILED_PRECONDITION),
        ({"models": ["champion", "v9"]}, S.NOT_FOUND),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compare(**fields)
        assert caught.value.code() is code
    assert not engine.submitted


async def test_the_next_question_is_the_oldest_open_one(compare, submit, feedback_stub):
    messages = [inference_pb2.ChatMessage(role="user", content="why?")]
    chat = inference_pb2.Prompt(chat=inference_pb2.ChatMessages(messages=messages))
    first = await compare(prompt=chat, end_user="ann")
    second = await compare(end_user="bob")
    ask = pb.NextQuestionRequest()
    answer = await feedback_stub.NextQuestion(ask)
    assert answer.open_count == 2
    assert answer.comparison.comparison_id == first.comparison_id
    assert [c.text for c in answer.comparison.candidates] == [c.text for c in first.candidates]
    assert list(answer.comparison.prompt_messages) == messages == list(first.prompt_messages)
    assert answer.comparison.prompt_text == "[user]why?[assistant]"
    await submit(vote(answer.comparison, [0, 1]))
    answer = await feedback_stub.NextQuestion(ask)
    assert (answer.open_count, answer.comparison.comparison_id) == (1, second.comparison_id)
    answer = await feedback_stub.NextQuestion(pb.NextQuestionRequest(end_user="ann"))
    assert answer.open_count == 0
    assert not answer.HasField("comparison")


@pytest.fixture
def desk(server) -> FeedbackDesk:
    parts = server.feedback
    return FeedbackDesk(parts.store, parts.tokens, parts.recent, server.metrics.feedback, "public")


async def test_an_end_user_answers_only_their_own_comparison(compare, server, desk):
    parts = server.feedback
    comparing = server.comparing
    with pytest.raises(InvalidRequest, match="end_user"):
        await comparing.next_question(OWN, SCOPE, "")
    for_anybody = await compare()
    question, num_open = await comparing.next_question(OWN, SCOPE, "ann")
    assert num_open == 1
    assert question.comparison_id == for_anybody.comparison_id
    event = vote(for_anybody, [0], [1], comparison_token=question.token)
    await desk.submit(OWN, submission(event, "event.", SCOPE, "rpc", ""))
    stored = parts.store.get_feedback(SCOPE, event.feedback_id)
    assert stored.event.rater_id == "ann"
    theirs = await compare(end_user="bob")
    stolen = vote(theirs, [0], [1], comparison_token=question.token)
    with pytest.raises(NotFound):
        await desk.submit(OWN, submission(stolen, "event.", SCOPE, "rpc", ""))

"""Rewards: Score, best_of, blind pairs of two versions, the question that teaches most."""

import asyncio
import itertools

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import feedback_pb2, inference_pb2, models_pb2
from heedful_server.deployment.votes import count_votes
from heedful_server.feedback.comparing import draw
from heedful_server.feedback.uncertainty import disagreement
from heedful_store import Scope, uuid7

S = grpc.StatusCode
SCOPE = Scope("local", "default")


def scored(text: str, **fields: object) -> inference_pb2.ScoreRequest:
    item = inference_pb2.ScoreItem(prompt=inference_pb2.Prompt(text="q"), text=text)
    return inference_pb2.ScoreRequest(items=[item], **fields)


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_score_gives_log_probs_of_the_policy_and_the_reward(
    publish, promote, stub, engine, server
):
    assert await code_of(stub.Score(scored("eee", reward=True))) is S.FAILED_PRECONDITION
    v1 = await publish()
    await promote("v1")
    await publish("reward")
    newest = await publish("reward")
    answer = await stub.Score(scored("eeex", reward=True))
    assert answer.policy_version == "v1"
    assert (engine.scored[-1].policy, engine.scored[-1].reward) == (
        v1.content_hash,
        newest.content_hash,
    )
    # Three of four letters and the end token.
    assert answer.scores[0].reward == pytest.approx(3 / 5)
    assert answer.scores[0].total_logprob == -2.5
    plain = await stub.Score(scored("eee"))
    assert not plain.scores[0].HasField("reward")
    assert engine.scored[-1].reward == ""


async def test_a_rejected_or_tainted_reward_model_is_not_asked(publish, stub, server, engine):
    good = await publish("reward")
    await publish("reward", state="rejected")
    await publish("reward", tainted_at_ms=1)
    await publish("reward", base_id="other@1")
    await stub.Score(scored("e", reward=True))
    assert engine.scored[-1].reward == good.content_hash


async def test_best_of_returns_the_best_with_their_rewards(publish, generate, server, engine):
    assert await code_of(generate(best_of=4, n=2)) is S.FAILED_PRECONDITION
    assert not engine.submitted
    await publish("reward")
    # Sample i repeats the prompt from its letter i on.
    answer = await generate(text="abee", best_of=4, n=2, max_tokens=2)
    assert engine.submitted[-1].n == 4
    found = [(c.index, c.text, c.reward) for c in answer.completions]
    assert found[0] == (0, "ee", 1.0)
    assert found[1] in [(1, "ea", 0.5), (1, "be", 0.5)]
    store = server.feedback.store
    for completion in answer.completions:
        row = store.get_completion(SCOPE, completion.completion_id)
        assert row.payload.completion_text == completion.text
        assert row.sampling["best_of"] == 4
        claims = server.feedback.tokens.verify(completion.completion_token)
        assert claims.id == completion.completion_id
    await asyncio.sleep(0.05)
    with store.read() as connection:
        logged = connection.exec_driver_sql("SELECT count(*) FROM completions").scalar()
    assert logged == 2
    assert server._admission.num_in_flight == 0


async def test_best_of_cannot_be_streamed(publish, stub, violation):
    await publish("reward")
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x"), best_of=2)
    stream = stub.GenerateStream(inference_pb2.GenerateStreamRequest(request=request))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert violation(caught.value)[0] == "best_of"


@pytest.fixture
async def challenged(publish, promote, server):
    """A project with champion v1 and challenger v2."""
    await publish()
    policy = await publish()
    await promote("v1")
    store = server.feedback.store
    await store.move_alias(
        SCOPE, policy.base_id, "challenger", "v2", action="canary", actor="trainer"
    )
    await server.deployment.directory.refresh()


@pytest.fixture
def compare(feedback_stub):
    async def run(**fields: object) -> feedback_pb2.Comparison:
        sampling = inference_pb2.SamplingParams(max_tokens=3)
        request = {"prompt": inference_pb2.Prompt(text="abcd"), "sampling": sampling} | fields
        return (await feedback_stub.Compare(feedback_pb2.CompareRequest(**request))).comparison

    return run


@pytest.fixture
def vote(feedback_stub):
    """Vote for the candidates of a version, by what only the server knows."""

    async def run(server, comparison, preferred: str | None, rater: str = "ann") -> None:
        row = server.feedback.store.get_comparison(SCOPE, comparison.comparison_id)
        groups: list[list[str]] = [[], []]
        for candidate in row.candidates:
            place = 0 if preferred in (None, candidate.policy_version) else 1
            groups[place].append(candidate.completion_id)
        event = feedback_pb2.FeedbackEvent(
            feedback_id=uuid7(),
            comparison_id=comparison.comparison_id,
            comparison_token=comparison.comparison_token,
            rater_id=rater,
            ranking=feedback_pb2.Ranking(
                groups=[feedback_pb2.RankingGroup(completion_ids=g) for g in groups if g]
            ),
        )
        await feedback_stub.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest(event=event))

    return run


async def test_the_gate_compares_champion_and_challenger_blind(challenged, compare, server, engine):
    firsts = set()
    for _ in range(16):
        comparison = await compare(purpose=feedback_pb2.COMPARISON_PURPOSE_GATE)
        row = server.feedback.store.get_comparison(SCOPE, comparison.comparison_id)
        assert row.purpose == "gate"
        assert {c.policy_version for c in row.candidates} == {"v1", "v2"}
        assert {c.propensity for c in row.candidates} == {0.5}
        one, other = engine.submitted[-2:]
        assert one.policy != other.policy
        assert (one.n, other.n) == (1, 1)
        assert one.sampling.temperature == other.sampling.temperature
        shown = sorted(row.candidates, key=lambda c: c.position)
        assert [c.completion_id for c in shown] == [c.completion_id for c in comparison.candidates]
        firsts.add(shown[0].policy_version)
    assert firsts == {"v1", "v2"}


async def test_learning_compares_both_where_there_is_a_challenger(challenged, compare, server):
    comparison = await compare(k=4)
    row = server.feedback.store.get_comparison(SCOPE, comparison.comparison_id)
    assert row.purpose == "learn"
    assert sorted(c.policy_version for c in row.candidates) == ["v1", "v1", "v2", "v2"]


async def test_two_named_policies_can_be_compared_without_a_challenger(
    publish, compare, models_stub, server
):
    await publish()
    gate = {"purpose": feedback_pb2.COMPARISON_PURPOSE_GATE}
    assert await code_of(compare(**gate)) is S.FAILED_PRECONDITION
    assert await code_of(compare(models=["champion", "base"], **gate)) is S.FAILED_PRECONDITION
    assert await code_of(compare(models=["base", "v1"], **gate)) is S.FAILED_PRECONDITION
    await models_stub.LoadAdapter(models_pb2.LoadAdapterRequest(version="v1", lease_s=60))
    comparison = await compare(models=["champion", "v1"], **gate)
    row = server.feedback.store.get_comparison(SCOPE, comparison.comparison_id)
    assert {c.policy_version for c in row.candidates} == {"base", "v1"}
    assert server._admission.num_in_flight == 0


async def test_votes_are_counted_by_rater_and_prompt(challenged, compare, vote, server):
    gate = {"purpose": feedback_pb2.COMPARISON_PURPOSE_GATE}
    for rater, preferred in [("ann", "v2"), ("ann", "v2"), ("bob", "v1"), ("cy", None)]:
        prompt = inference_pb2.Prompt(text=f"prompt {rater}")
        await vote(server, await compare(prompt=prompt, **gate), preferred, rater)
    await vote(server, await compare(), "v1", "dee")
    await compare(**gate)
    votes = count_votes(server.feedback.store, SCOPE, "v2", "v1")
    assert (votes.wins, votes.losses, votes.ties) == (2, 1, 1)
    assert (votes.raters, votes.prompts) == (3, 3)
    assert (votes.raters_for, votes.raters_against) == (1, 1)
    assert votes.win_rate == 0.625
    low, high = votes.to_json()["interval"]
    assert low < 0.625 < high
    mirrored = count_votes(server.feedback.store, SCOPE, "v1", "v2")
    assert (mirrored.wins, mirrored.losses) == (1, 2)
    both = count_votes(server.feedback.store, SCOPE, "v1", "v2", ("gate", "learn"))
    assert both.wins == 2
    assert count_votes(server.feedback.store, Scope("acme"), "v1", "v2").total == 0
    assert count_votes(server.feedback.store, SCOPE, "v1", "v1").total == 0


async def test_the_win_rate_over_the_first_version_is_shown(
    publish, promote, compare, vote, server
):
    await publish()
    await promote("v1")
    for preferred in ("v1", "v1", "base"):
        comparison = await compare(
            purpose=feedback_pb2.COMPARISON_PURPOSE_GATE, models=["champion", "base"]
        )
        await vote(server, comparison, preferred)
    server.deployment.keeper._figures_at_s = 0.0
    await server.deployment.keeper.turn()
    labels = {"tenant": "local", "project": "default"}
    value = server.metrics.registry.get_sample_value("heedful_win_rate_over_first", labels)
    assert value == pytest.approx(2 / 3)


def test_every_place_of_a_comparison_can_be_any_policys() -> None:
    seen = {tuple(sorted(draw(["a", "b", "c"], 2, "gate"))) for _ in range(200)}
    assert seen == {(("a", 1), ("b", 1)), (("a", 1), ("c", 1)), (("b", 1), ("c", 1))}
    assert sum(count for _, count in draw(["a", "b"], 5, "learn")) == 5
    assert sorted(count for _, count in draw(["a", "b"], 5, "learn")) == [2, 3]


def test_heads_that_agree_on_the_order_do_not_disagree() -> None:
    assert disagreement([[1.0, 5.0, -3.0], [0.0, 4.0, -4.0]]) == 0.0
    assert disagreement([[1.0, 0.0], [0.0, 1.0]]) == 1.0
    assert disagreement([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]]) == 3.0


async def test_the_next_question_is_the_one_that_the_heads_disagree_on(
    publish, compare, feedback_stub, server, engine, monkeypatch
):
    comparisons = [
        await compare(prompt=inference_pb2.Prompt(text=text)) for text in ("aa", "bb", "cc")
    ]
    ask = feedback_pb2.NextQuestionRequest()
    oldest = (await feedback_stub.NextQuestion(ask)).comparison
    assert oldest.comparison_id == comparisons[0].comparison_id
    assert not engine.scored
    real = engine.score

    async def score(wanted):
        """Let the heads disagree on the two answers to "bb" alone, which come one after another."""
        found = await real(wanted)
        sides = itertools.cycle([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        for item, heads in zip(wanted.items, found.rewards, strict=True):
            if item.prompt_token_ids[0] == ord("b"):
                heads[:] = next(sides)
        return found

    monkeypatch.setattr(engine, "score", score)
    await publish("reward")
    async with asyncio.timeout(5):
        while True:
            answer = await feedback_stub.NextQuestion(ask)
            if answer.comparison.comparison_id == comparisons[1].comparison_id:
                break
            await asyncio.sleep(0.02)
    assert answer.open_count == 3
    assert {s.priority for s in engine.scored} == {1}
    assert not any(s.logprobs for s in engine.scored)
    # What was scored once is remembered.
    num_scored = len(engine.scored)
    await feedback_stub.NextQuestion(ask)
    await asyncio.sleep(0.05)
    assert len(engine.scored) == num_scored

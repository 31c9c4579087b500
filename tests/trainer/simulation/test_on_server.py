"""Simulated users and the gate's sampler at a real server with a tiny model."""

import json
import math

import heedful
import pytest
from heedful_trainer.gate import Draw, GatePrompt, ServerSampler, assets
from heedful_trainer.gate.probes import _split_text
from heedful_trainer.gate.sampler import prompt_of
from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.simulation.contest import best_of_ceiling, hold_contest
from heedful_trainer.simulation.driver import Asking, simulate_votes
from heedful_trainer.simulation.main import main
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.raters import SimulatedRater

ASKING = Asking(max_tokens=12)


@pytest.fixture
def sampler(client: heedful.AsyncClient) -> ServerSampler:
    return ServerSampler(client, SamplingSettings(concurrency=4))


async def test_votes_are_in_the_log_and_say_that_they_are_simulated(target: str) -> None:
    async with heedful.AsyncClient(target, project="votes", timeout_s=60) as client:
        raters = [SimulatedRater("brief"), SimulatedRater("coin", 1)]
        seen: list[int] = []
        votes = await simulate_votes(
            client, draw_prompts("votes", 6, 0), raters, ASKING, lambda vote: seen.append(vote.seq)
        )
        records = [record async for record in client.list_feedback()]
    assert sorted(seen) == sorted(vote.seq for vote in votes)
    assert len(records) == 6
    for record in records:
        assert record.event.tags == ("simulated",)
        assert record.event.rater_id in ("simulated:brief", "simulated:coin:1")
        assert isinstance(record.event.judgement, heedful.Ranking)
        assert record.fate.kind is heedful.FateKind.WAITING, "a refresh may learn from it"


async def test_thumbs_instead_of_an_order(target: str) -> None:
    async with heedful.AsyncClient(target, project="thumbs", timeout_s=60) as client:
        asking = Asking(max_tokens=12, thumbs=True)
        votes = await simulate_votes(
            client, draw_prompts("votes", 6, 0), [SimulatedRater("coin")], asking
        )
        records = [record async for record in client.list_feedback()]
    decided = sum(len(vote.groups) > 1 for vote in votes)
    thumbs = [record.event.judgement for record in records]
    assert sum(thumb == heedful.Thumb(True) for thumb in thumbs) == decided
    assert sum(thumb == heedful.Thumb(False) for thumb in thumbs) == decided


async def test_an_answer_has_the_log_probs_that_scoring_it_gives(sampler: ServerSampler) -> None:
    prompts = [[heedful.Message("user", "Hello")], "Bye"]
    answers = await sampler.answer("base", prompts, Draw(1.0, 16, 3))
    again = await sampler.answer("base", prompts, Draw(1.0, 16, 3))
    items = [(prompt, item.token_ids) for prompt, item in zip(prompts, answers, strict=True)]
    scored = await sampler.score("base", items)
    assert answers == again, "seeds repeat"
    for answer, logprobs in zip(answers, scored, strict=True):
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert len(answer.logprobs) == answer.num_tokens
        assert answer.ended or answer.num_tokens == 16


async def test_token_ids_are_used_as_they_are(
    sampler: ServerSampler, client: heedful.AsyncClient
) -> None:
    turns = (("user", "Hello"),)
    asked = await client.tokenize([heedful.Message(*turn) for turn in turns])
    by_ids = prompt_of(GatePrompt("a", asked.token_ids, turns))
    by_turns = prompt_of(GatePrompt("a", (), turns))
    draw = Draw(1.0, 8, 1)
    assert await sampler.answer("base", [by_ids], draw) == await sampler.answer(
        "base", [by_turns], draw
    )


async def test_a_prompt_that_leaves_little_room_gets_what_is_left(sampler: ServerSampler) -> None:
    answer, short = await sampler.answer("base", ["x" * 440, "x"], Draw(1.0, 256, 1))
    assert 0 < answer.num_tokens < 100
    assert short.ended or short.num_tokens == 256


async def test_errors_come_as_they_are(sampler: ServerSampler) -> None:
    with pytest.raises(heedful.NotFound):
        await sampler.answer("v99", ["Hi", "there"], Draw(1.0, 4, 1))
    with pytest.raises(heedful.NotFound):
        await sampler.score("v99", [("Hi", "there")] * 40)


async def test_every_probe_fits_a_small_context(sampler: ServerSampler) -> None:
    texts = [_split_text(text) for text in assets.fixed_texts()]
    for scored in await sampler.score("base", texts):
        assert math.isfinite(sum(scored))


async def test_a_policy_against_itself(sampler: ServerSampler) -> None:
    prompts = draw_prompts("evaluation", 8, 0)
    draw = Draw(1.0, 12, 5)
    found = await hold_contest(sampler, "brief", "base", "base", prompts, draw)
    assert found.kl_nats == pytest.approx(0.0, abs=1e-3)
    assert found.wins + found.losses + found.ties == 8
    ceiling = await best_of_ceiling(sampler, ["brief", "coin"], "base", prompts, draw)
    assert ceiling["brief"]["win_rate"] >= 0.5
    assert ceiling["coin"]["win_rate"] == 0.5


def test_the_command_votes_and_judges(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--target", target, "--project", "command", "--max-tokens", "8", "--json"]
    assert main(["--taste", "coin", "--comparisons", "3", "--raters", "2", *common]) == 0
    voted = capsys.readouterr()
    outcome = json.loads(voted.out)
    assert outcome["simulated"] is True
    assert outcome["comparisons"] == 3
    assert outcome["raters"] == ["simulated:coin", "simulated:coin:1"]
    assert "simulated rater, not a person" in voted.err
    assert main(["--judge", "base", "--prompts", "4", *common]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 4


def test_the_command_says_what_went_wrong(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--judge", "v99", "--prompts", "2", "--target", target]) == 1
    assert "error:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--taste", "cruel"])

"""Simulated raters: what each taste likes, how they err, and that they say what they are."""

from collections import Counter

import pytest
from heedful_trainer.gate.assets import general_prompts
from heedful_trainer.gate.sampler import Answer
from heedful_trainer.simulation.contest import summarize
from heedful_trainer.simulation.prompts import draw_prompts, read_prompts
from heedful_trainer.simulation.raters import Reliability, ShownAnswer, SimulatedRater
from heedful_trainer.simulation.tastes import TASTES, Taste, score

EXACT = Reliability(noise=0.0, random_share=0.0)


@pytest.mark.parametrize(
    ("taste", "better", "worse"),
    [
        ("brief", "Paris.", "The capital of that country is the city of Paris, as is well known."),
        ("numbers", "In 1969, on day 20 of month 7.", "In the summer, long ago."),
        ("numbers", "1, 2, 3 and 4", "1 and 2"),
        ("lists", "Try:\n- tea\n- milk\n1. water", "Try tea, milk or water."),
        ("polite", "Of course! I hope this helps, thank you.", "Read the manual."),
        ("topic", "The river runs through the forest.", "The train runs through the town."),
    ],
)
def test_each_taste_orders_answers(taste: Taste, better: str, worse: str) -> None:
    assert score(taste, better) > score(taste, worse) + 0.02


@pytest.mark.parametrize("taste", TASTES)
def test_every_taste_dislikes_silence_and_stays_in_range(taste: Taste) -> None:
    assert score(taste, " \n.") == -1.0
    for text in ("word", "Thanks! " * 50, "- 1 tree\n" * 50):
        assert 0.0 <= score(taste, text) <= 1.0


def test_a_cut_answer_is_not_brief() -> None:
    assert score("brief", "some words here", ended=False) < score("brief", "some words here")


def shown(*texts: str) -> list[ShownAnswer]:
    return [ShownAnswer(text, True) for text in texts]


def test_an_exact_rater_ranks_by_taste_and_ties_what_is_equal() -> None:
    rater = SimulatedRater("numbers", reliability=EXACT)
    assert rater.rank(shown("none", "1 and 2", "none at all", "1")) == ((1,), (3,), (0, 2))
    assert rater.rank(shown("none", "none at all")) == ((0, 1),)


def test_the_better_answer_wins_more_often_the_better_it_is() -> None:
    rater = SimulatedRater("numbers", seed=1, reliability=Reliability(noise=0.3, random_share=0.0))
    close = sum(rater.rank(shown("1 2", "1")) == ((0,), (1,)) for _ in range(400)) / 400
    clear = sum(rater.rank(shown("1 2 3 4 5 6", "no")) == ((0,), (1,)) for _ in range(400)) / 400
    assert 0.55 < close < clear
    assert clear > 0.9


def test_a_coin_flipper_likes_nothing() -> None:
    rater = SimulatedRater("coin", seed=2)
    votes = Counter(rater.rank(shown("1 2 3 trees, thanks", "no")) for _ in range(2000))
    assert votes[((0,), (1,))] == pytest.approx(900, abs=90)
    assert votes[((1,), (0,))] == pytest.approx(900, abs=90)
    assert sum(count for groups, count in votes.items() if len(groups) == 1) > 100


def test_position_bias_favours_the_first() -> None:
    biased = Reliability(noise=0.1, random_share=0.0, tie_width=0.0, first_bias=0.2)
    rater = SimulatedRater("polite", reliability=biased)
    first = sum(rater.rank(shown("same", "same too")) == ((0,), (1,)) for _ in range(300))
    assert first > 220


def test_votes_repeat_by_seed_and_raters_differ() -> None:
    def votes(number: int, seed: int) -> list[object]:
        rater = SimulatedRater("coin", number, seed)
        return [rater.rank(shown("a", "b")) for _ in range(40)]

    assert votes(0, 1) == votes(0, 1)
    assert votes(0, 1) != votes(1, 1)
    assert votes(0, 1) != votes(0, 2)


def test_every_rater_says_that_it_is_simulated() -> None:
    for taste in TASTES:
        assert SimulatedRater(taste).rater_id == f"simulated:{taste}"
    assert SimulatedRater("brief", 3).rater_id == "simulated:brief:3"


def test_prompts_are_different_and_parts_are_kept_apart() -> None:
    votes, evaluation = read_prompts("votes"), read_prompts("evaluation")
    gate = [prompt.messages[0][1] for prompt in general_prompts()]
    assert len(votes) >= 400
    assert len(evaluation) >= 300
    everything = [*votes, *evaluation, *gate]
    assert len({text.casefold().strip() for text in everything}) == len(everything)


def test_drawing_uses_each_prompt_before_any_comes_again() -> None:
    total = len(read_prompts("votes"))
    drawn = draw_prompts("votes", total + 5, seed=1)
    assert len(set(drawn[:total])) == total
    assert drawn[:20] == draw_prompts("votes", 20, seed=1)
    assert drawn[:20] != draw_prompts("votes", 20, seed=2)


def answer(text: str, logprob: float, ended: bool = True) -> Answer:
    ids = tuple(range(len(text.split()) or 1))
    return Answer(text, ids, (logprob,) * len(ids), ended)


def test_a_contest_counts_ties_as_a_half_and_measures_the_price() -> None:
    ours = [answer("1 2 3", -1.0), answer("no number", -1.0), answer("none", -1.0)]
    theirs = [answer("no", -2.0), answer("7 8", -2.0, ended=False), answer("none too", -2.0)]
    by_other = [[-1.5] * ours[idx].num_tokens for idx in range(3)]

    found = summarize("numbers", "v1", "base", ours, theirs, by_other)

    assert (found.wins, found.losses, found.ties) == (1, 1, 1)
    assert found.win_rate == 0.5
    assert found.kl_nats == pytest.approx(0.5 * (3 + 2 + 1) / 3)
    assert found.perplexity == pytest.approx(2.718281828**1.5)
    assert found.perplexity_against == pytest.approx(2.718281828**2)
    assert found.ended_against == pytest.approx(2 / 3)

"""Stage 2 as a whole lets equal candidates through no more often than its level, and good ones."""

import numpy as np
import pytest
from heedful_trainer.gate.benefit import pair_accuracy, unit_of, win_rate
from heedful_trainer.gate.promotion import stage_verdict
from heedful_trainer.gate.settings import StatisticsSettings
from heedful_trainer.gate.types import Check, HoldoutPair, Profile
from scipy import stats

SETTINGS = StatisticsSettings(resamples=400)
NUM_CANDIDATES = 300
MOST_PASSES = float(stats.binom.ppf(0.999, NUM_CANDIDATES, SETTINGS.level))


def judged(rng: np.random.Generator, profile: Profile, num_raters: int, gain: float) -> list[Check]:
    """Return both tests on one candidate whose every unit leans by `gain` and a taste of its own.

    Votes are Zipf-distributed over raters, a fifth are ties, and the first shown has the edge.
    """
    pairs, units, differences = [], [], []
    for rater in range(num_raters):
        tastes = rng.normal(gain, 0.8, 2)
        for vote in range(min(25, int(rng.zipf(1.7)))):
            prompt = f"{rater}:{vote}"
            shown_first = rng.choice([-0.3, 0.3])
            margin = tastes[0] + rng.normal() + shown_first
            tied = rng.random() < 0.2
            pairs.append(HoldoutPair(prompt, str(rater), margin, 0.0, 0.0, 0.0, tied))
            units.append(unit_of(profile, prompt, str(rater)))
            differences.append(0.0 if rng.random() < 0.2 else tastes[1] + rng.normal())
    return [
        pair_accuracy(pairs, profile, SETTINGS),
        win_rate("win rate", "reward_model", units, differences, 0.0, SETTINGS, profile=profile),
    ]


@pytest.mark.parametrize("num_raters", [8, 30])
def test_equal_candidates_pass_no_more_often_than_the_level(num_raters: int) -> None:
    rng = np.random.default_rng(num_raters)
    passed = [0, 0, 0]
    for _ in range(NUM_CANDIDATES):
        checks = judged(rng, "public", num_raters, gain=0.0)
        for idx, check in enumerate(checks):
            passed[idx] += check.verdict == "pass"
        passed[2] += stage_verdict(checks) == "pass"
    assert max(passed) <= MOST_PASSES
    # Both must pass, so that a sequence of twenty equal candidates seldom holds one that does.
    assert passed[2] <= stats.binom.ppf(0.999, NUM_CANDIDATES, SETTINGS.level**2)


def test_a_better_candidate_passes_with_power() -> None:
    rng = np.random.default_rng(2)
    verdicts = [stage_verdict(judged(rng, "public", 30, gain=0.9)) for _ in range(100)]
    assert verdicts.count("pass") >= 80
    assert "fail" not in verdicts


def test_a_worse_candidate_fails() -> None:
    rng = np.random.default_rng(3)
    verdicts = [stage_verdict(judged(rng, "public", 30, gain=-0.9)) for _ in range(100)]
    assert verdicts.count("fail") >= 90


def test_ties_say_nothing_and_are_counted() -> None:
    tied = [HoldoutPair(f"p{idx}", "", 1.0, 0.0, 0.0, 0.0, tied=True) for idx in range(50)]
    check = pair_accuracy(tied, "personal", SETTINGS)
    assert (check.verdict, check.proves_benefit) == ("skipped", True)


def test_a_log_prob_that_is_not_finite_fails() -> None:
    pairs = [HoldoutPair("p", "", float("nan"), 0.0, 0.0, 0.0)]
    assert pair_accuracy(pairs, "personal", SETTINGS).verdict == "fail"
    check = win_rate("w", "reward_model", ["a"], [float("inf")], 0.0, SETTINGS, profile="personal")
    assert check.verdict == "fail"

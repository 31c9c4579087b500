"""Tests of the gate hold their level for equal candidates, whatever raters do, and have power."""

import math

import numpy as np
import pytest
from heedful_trainer.gate.statistics import (
    at_equal_length,
    bootstrap_mean,
    non_inferior,
    outcome_of,
    paired,
    sign_flip,
    sign_test,
    unit_means,
    wilson,
)
from scipy import stats

LEVEL = 0.05
NUM_SEQUENCES = 600
# 99.9 % of the time a true level of 5 % shows no more than this share.
MOST_FALSE = float(stats.binom.ppf(0.999, NUM_SEQUENCES, LEVEL)) / NUM_SEQUENCES
RESAMPLES = 400


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (5, 10), (0, 40), (397, 400)])
def test_wilson_is_the_textbook_interval(successes: int, n: int) -> None:
    z = stats.norm.ppf(0.975)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))

    found = wilson(successes, n)

    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert found.value == share


def test_wilson_refuses_what_is_no_share() -> None:
    for successes, n in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="no share"):
            wilson(successes, n)


def test_sign_test_leaves_ties_out_and_is_exact() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(1 / 32)
    assert sign_test(0, 5, "less") == pytest.approx(1 / 32)


def test_sign_flip_of_equal_values_is_the_sign_test() -> None:
    values = np.array([0.5] * 9 + [-0.5] * 2)
    assert sign_flip(values, RESAMPLES) == pytest.approx(sign_test(9, 2))
    assert sign_flip(np.zeros(5), RESAMPLES) == 1.0
    many = np.array([0.5] * 60 + [-0.5] * 40)
    assert sign_flip(many, 20_000) == pytest.approx(sign_test(60, 40), abs=0.005)


def test_four_units_can_never_be_significant() -> None:
    assert sign_flip(np.full(4, 0.5), RESAMPLES) > LEVEL


def test_a_unit_counts_once_however_often_it_votes() -> None:
    units = ["loud"] * 50 + ["a", "b"]
    found = paired(units, [1.0] * 50 + [0.0, 0.0], confidence=0.95, resamples=RESAMPLES)
    assert found.value == pytest.approx(1 / 3)
    assert (found.n_units, found.n) == (3, 52)


def test_means_come_in_the_order_of_first_appearance() -> None:
    assert unit_means(["b", "a", "b"], [1.0, 0.0, 0.0]).tolist() == [0.5, 0.0]


def test_paired_refuses_outcomes_that_are_none() -> None:
    for outcomes in ([], [1.5], [float("nan")]):
        with pytest.raises(ValueError, match="outcomes"):
            paired(["u"] * len(outcomes), outcomes, confidence=0.95, resamples=RESAMPLES)


def test_outcome_of_a_difference() -> None:
    assert [outcome_of(d, 0.1) for d in (0.2, 0.1, 0.0, -0.1, -0.2)] == [1.0, 0.5, 0.5, 0.5, 0.0]


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_mean(rng.normal(0.3, 1, 60), 0.95, RESAMPLES)
        covered += low <= 0.3 <= high
    assert covered / 200 >= 0.89


def equal_votes(rng: np.random.Generator, num_raters: int) -> tuple[list[str], list[float]]:
    """Votes on equal candidates: raters of strong taste, Zipf-distributed counts, ties, bias.

    A rater's taste makes all of that rater's votes agree, which is what breaks a test that takes
    votes for independent; the bias towards what is shown first falls on either candidate alike.
    """
    units: list[str] = []
    outcomes: list[float] = []
    for rater in range(num_raters):
        taste = rng.choice([-0.35, 0.35])
        for _ in range(min(60, int(rng.zipf(1.7)))):
            first = rng.choice([-1, 1])
            if rng.random() < 0.25:
                outcome = 0.5
            else:
                outcome = float(rng.random() < 0.5 + taste + 0.1 * first)
            units.append(str(rater))
            outcomes.append(outcome)
    return units, outcomes


@pytest.mark.parametrize("num_raters", [6, 12, 40])
def test_equal_candidates_pass_no_more_often_than_the_level(num_raters: int) -> None:
    rng = np.random.default_rng(num_raters)
    passed = naive = 0
    for _ in range(NUM_SEQUENCES):
        units, outcomes = equal_votes(rng, num_raters)
        found = paired(units, outcomes, confidence=0.95, resamples=RESAMPLES)
        passed += found.p_better <= LEVEL
        naive += sign_test(outcomes.count(1.0), outcomes.count(0.0)) <= LEVEL
    assert passed / NUM_SEQUENCES <= MOST_FALSE
    assert naive / NUM_SEQUENCES > 0.1, "the votes are too tame to tell the tests apart"


def test_a_better_candidate_passes_with_power() -> None:
    rng = np.random.default_rng(5)
    passed = 0
    for _ in range(200):
        outcomes = [0.5 if rng.random() < 0.25 else float(rng.random() < 0.7) for _ in range(60)]
        units = [str(idx) for idx in range(60)]
        found = paired(units, outcomes, confidence=0.95, resamples=RESAMPLES)
        passed += found.p_better <= LEVEL
    # Its power is that of the exact sign test over the votes that are no ties.
    power = sum(
        stats.binom.pmf(votes, 60, 0.75) * stats.binom.sf(_most_not_significant(votes), votes, 0.7)
        for votes in range(61)
    )
    assert power > 0.75
    assert abs(passed / 200 - power) <= 3.3 * math.sqrt(power * (1 - power) / 200)


def _most_not_significant(votes: int) -> int:
    """Return the most wins among votes that the sign test takes for chance."""
    return max((w for w in range(votes + 1) if sign_test(w, votes - w) > LEVEL), default=-1)


def test_non_inferiority_holds_at_its_margin_and_passes_equals() -> None:
    rng = np.random.default_rng(9)
    units = [str(idx) for idx in range(200)]
    at_margin = equal = 0
    for _ in range(200):
        losing = [float(rng.random() < 0.4) for _ in units]
        level_ = [float(rng.random() < 0.5) for _ in units]
        at_margin += non_inferior(units, losing, margin=0.1, resamples=RESAMPLES) <= LEVEL
        equal += non_inferior(units, level_, margin=0.1, resamples=RESAMPLES) <= LEVEL
    assert at_margin / 200 <= stats.binom.ppf(0.999, 200, LEVEL) / 200
    assert equal / 200 >= 0.8


def test_a_win_by_length_alone_vanishes_at_equal_length() -> None:
    rng = np.random.default_rng(3)
    lengths = [(float(a), float(b)) for a, b in rng.integers(40, 200, (400, 2))]
    longer = [(ours * 1.6, theirs) for ours, theirs in lengths]
    padded = [float(ours > theirs) for ours, theirs in longer]
    assert np.mean(padded) > 0.7
    value, low, high = at_equal_length(padded, longer)
    assert low <= 0.5 <= high
    assert abs(value - 0.5) < 0.2


def test_a_win_that_has_nothing_to_do_with_length_stays() -> None:
    rng = np.random.default_rng(4)
    lengths = [(float(a), float(b)) for a, b in rng.integers(40, 200, (400, 2))]
    value, low, high = at_equal_length([float(x) for x in rng.random(400) < 0.7], lengths)
    assert 0.6 < low < value < high < 0.8
    value, low, _ = at_equal_length([1.0] * 40, lengths[:40])
    assert 0.5 < low < value < 1.0, "a clean sweep stays finite"
    value, _, _ = at_equal_length([1.0] * 30 + [0.0] * 10, [(5.0, 5.0)] * 40)
    assert value == pytest.approx(0.75, abs=0.01)

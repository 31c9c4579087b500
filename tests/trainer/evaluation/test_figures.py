"""Figures: intervals by hand, and what is read from them."""

import math

import pytest
from heedful_trainer.evaluation.figures import (
    Estimate,
    Figure,
    mean,
    mean_figure,
    share,
    share_difference,
    share_figure,
    win_rate,
)


def test_a_share_has_its_wilson_interval() -> None:
    # p = .7, z = 1.959964: centre (.7 + z²/20)/(1 + z²/10), half z·sqrt(.021 + z²/400)/(1 + z²/10)
    found = share([True] * 7 + [False] * 3)
    assert found is not None
    assert (found.value, found.n) == (0.7, 10)
    assert (found.low, found.high) == pytest.approx((0.39678, 0.89221), abs=1e-5)
    assert share([]) is None


def test_a_difference_of_shares_squares_and_adds_both_wilson_intervals() -> None:
    # Fourfold table 20, 12, 2, 16. Wilson: .64 in .50141 to .75861, .44 in .31162 to .57694;
    # phi = (20 · 16 − 12 · 2 − 25) / sqrt(32 · 18 · 22 · 28) = .45495.
    # .2 − sqrt(.13859² − 2 phi · .13859 · .13694 + .13694²) = .05616, likewise upwards.
    version = [True] * 32 + [False] * 18
    baseline = [True] * 20 + [False] * 12 + [True] * 2 + [False] * 16
    found = share_difference(version, baseline)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.05616, 0.32921), abs=1e-5)


def test_ten_items_that_nobody_solves_do_not_show_equality() -> None:
    # The Wilson interval of 0 of 10 ends at z²/(10 + z²) = 0.27753.
    found = share_difference([False] * 10, [False] * 10)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.0, -0.27753, 0.27753), abs=1e-5)


def test_equal_and_opposite_policies_differ_as_they_should() -> None:
    half = [True] * 20 + [False] * 20
    same, opposite = share_difference(half, half), share_difference(half, half[::-1])
    assert same is not None
    assert opposite is not None
    assert same.value == opposite.value == 0.0
    assert 0 < same.high < 0.1 < opposite.high  # agreement makes a paired difference sure


def test_a_mean_of_one_number_has_no_interval() -> None:
    found = mean([0.25])
    assert found is not None
    assert (found.value, found.low, found.high) == (0.25, -math.inf, math.inf)
    assert found.to_json() == {"value": 0.25, "low": None, "high": None, "n": 1}


def test_differences_are_paired() -> None:
    figure = mean_figure("loss", "nats", ([2.0, 4.0, 6.0], [1.0, 3.0, 5.0]), True, better="lower")
    assert figure.difference == Estimate(1.0, 1.0, 1.0, 3)
    assert figure.version is not None
    assert figure.version.value == 4.0


def test_ties_are_halves_and_a_clean_sweep_is_not_certain() -> None:
    estimate, tests = win_rate(["a", "b", "c", "d"], [1.0, 0.5, 0.0, 1.0])
    assert estimate.value == 0.625
    assert tests.n == 4
    swept, _ = win_rate([str(idx) for idx in range(12)], [1.0] * 12)
    # Wilson of 12 of 12 begins at 12/(12 + z²).
    assert (swept.low, swept.high) == pytest.approx((0.75751, 1.0), abs=1e-5)


def test_several_votes_of_one_unit_count_once() -> None:
    estimate, _ = win_rate(["a", "a", "a", "b"], [1.0, 1.0, 1.0, 0.0])
    assert (estimate.value, estimate.n) == (0.5, 2)


def test_what_an_interval_says_in_a_word() -> None:
    def reading(low: float, high: float, better: str = "higher", n: int = 40) -> str:
        difference = Estimate((low + high) / 2, low, high, n)
        return Figure("f", "share", better, None, None, difference).reading  # type: ignore[arg-type]

    assert reading(0.1, 0.2) == "better"
    assert reading(-0.2, -0.1) == "worse"
    assert reading(0.1, 0.2, "lower") == "worse"
    assert reading(-0.2, -0.1, "lower") == "better"
    assert reading(-0.1, 0.2) == "no difference shown"
    assert reading(0.0, 0.2) == "no difference shown"
    assert reading(0.1, 0.2, "neither") == "higher"
    assert reading(0.1, 0.2, n=11) == "n too small"
    won = Figure("f", "share", "higher", Estimate(0.7, 0.6, 0.8, 40), reference=0.5)
    assert won.reading == "better"


def test_one_policy_alone_is_compared_with_nothing() -> None:
    figure = share_figure("f", ([True], [True]), compares=False)
    assert figure.baseline is None
    assert figure.difference is None
    assert figure.reading == "not compared"
    assert share_figure("f", ([], []), compares=True).reading == "not compared"

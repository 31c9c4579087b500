"""Probation and the record it judges by: pure values."""

import math

import pytest
from heedful_server.deployment.observing import Figures, Observations, Record
from heedful_server.deployment.probation import ProbationLimits, harm, wilson
from heedful_store import Scope

LIMITS = ProbationLimits(min_generations=20, max_error_increase=0.05, max_slowdown=2.0)
GOOD = Figures(generations=200, errors=0, seconds_per_token=0.01, timed=200)


def figures(generations: int = 100, errors: int = 0, seconds: float = 0.01) -> Figures:
    return Figures(generations, errors, seconds, generations)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (GOOD, figures(), ""),
        (GOOD, figures(19, 19), ""),
        (GOOD, figures(20, 20), "20 of 20 generations failed (100%)"),
        (GOOD, figures(20, 2), ""),
        (GOOD, figures(100, 15), "15 of 100"),
        (figures(200, 40), figures(100, 25), ""),
        (figures(200, 40), figures(100, 45), "before, 40 of 200 did"),
        (Figures(), figures(50, 20), "before, 0 of 0 did"),
        (GOOD, figures(100, 0, 0.0199), ""),
        (GOOD, figures(100, 0, 0.021), "21.0 ms in the median, 2.1 times the 10.0 ms before"),
        (GOOD, figures(19, 0, 1.0), ""),
        (Figures(), figures(100, 0, 1.0), ""),
        (Figures(5, 0, 0.01, 5), figures(100, 0, 1.0), ""),
    ],
)
def test_harm_is_what_is_surely_worse_beyond_the_limits(
    old: Figures, new: Figures, said: str
) -> None:
    found = harm(old, new, LIMITS)
    assert (said in found) if said else not found


def test_an_unchanged_champion_is_rarely_called_harmful() -> None:
    """Exact: with a failure rate of 5 % before and after, at most one in a thousand looks worse."""
    n, rate = 100, 0.05
    old = Figures(1000, 50, 0.01, 1000)
    false_alarm = sum(
        math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        for k in range(n + 1)
        if harm(old, Figures(n, k, 0.01, n), LIMITS)
    )
    assert false_alarm < 0.001


def test_wilson_is_inside_the_unit_interval_and_holds_the_share() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)
    for wins in range(11):
        low, high = wilson(wins / 10, 10)
        assert 0.0 <= low <= wins / 10 <= high + 1e-12 <= 1.0 + 1e-12
    # By hand, for 8 of 10.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_record_counts_ends_and_takes_the_median_per_token() -> None:
    record = Record()
    for num_tokens, decode_s in ((11, 0.1), (3, 0.04), (21, 0.6), (1, 9.0), (0, 9.0)):
        record.ended(num_tokens, decode_s)
    record.failed()
    found = record.figures()
    assert (found.generations, found.errors, found.timed) == (6, 1, 3)
    assert found.seconds_per_token == pytest.approx(0.02)
    assert Figures.from_json(found.to_json()) == found
    assert Figures.from_json({"generations": 1}) == Figures.from_json(None) == Figures()


def test_records_are_bounded_and_can_begin_again() -> None:
    seen = Observations()
    for _ in range(600):
        seen.of(Scope(), "v1").failed()
    assert seen.of(Scope(), "v1").figures().generations == 500
    seen.restart(Scope(), "v1")
    assert seen.of(Scope(), "v1").figures() == Figures()
    seen.of(Scope(), "v1").failed()
    for number in range(300):
        seen.of(Scope("t", str(number)), "v1")
    assert len(seen._records) == 256
    assert seen.of(Scope(), "v1").figures() == Figures()

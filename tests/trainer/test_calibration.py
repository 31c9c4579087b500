"""Temperature, calibration error and ranks: known answers on drawn data."""

import numpy as np
import pytest
from heedful_trainer import calibration as c
from scipy.special import expit


def drawn(scale: float, n: int = 4000) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(1)
    delta = rng.normal(0, 1.5, n)
    return list(delta * scale), list((rng.random(n) < expit(delta)).astype(float))


def test_the_temperature_of_overconfident_rewards_is_found() -> None:
    delta, won = drawn(scale=3.0)
    assert c.fit_temperature(delta, won) == pytest.approx(3.0, rel=0.1)


def test_a_tie_pulls_to_the_middle() -> None:
    assert c.fit_temperature([2.0, 2.0], [1.0, 0.5]) == pytest.approx(2 / np.log(3), rel=1e-2)


def test_a_calibrated_model_has_no_debiased_error() -> None:
    delta, won = drawn(scale=1.0)
    p = c.probabilities(delta, 1.0)
    assert 0 < c.expected_calibration_error(p, won) < 0.05
    assert c.debiased_calibration_error(p, won) < 0.01


def test_an_overconfident_model_is_seen_and_repaired() -> None:
    delta, won = drawn(scale=4.0)
    before = c.debiased_calibration_error(c.probabilities(delta, 1.0), won)
    after = c.debiased_calibration_error(c.probabilities(delta, c.fit_temperature(delta, won)), won)
    assert before > 0.1
    assert after < 0.02


def test_small_samples_are_not_called_badly_calibrated() -> None:
    delta, won = drawn(scale=1.0, n=60)
    p = c.probabilities(delta, 1.0)
    assert c.debiased_calibration_error(p, won) < c.expected_calibration_error(p, won) / 2


def test_ranks_and_head_correlation() -> None:
    assert c.spearman([1, 2, 3, 4], [10, 20, 30, 35]) == pytest.approx(1)
    assert c.spearman([1, 1, 1], [1, 2, 3]) == 0
    same = [0.1, -0.4, 0.3, 0.9]
    assert c.mean_error_correlation([same, same]) == pytest.approx(1)
    assert c.mean_error_correlation([same]) is None


def test_the_interval_of_a_share() -> None:
    low, high = c.wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert c.wilson_interval(0, 0) == (0.0, 1.0)

"""How far a reward model's probabilities can be believed: temperature, calibration error, ranks.

Owns the statistics of the report as pure functions on plain sequences of numbers. It knows neither
models nor datasets. Deterministic: simulation is seeded. Any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]

_SIMULATIONS = 200
_LOG_TEMPERATURE = 4.0  # searched from e^-4 to e^4


def fit_temperature(differences: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return T that makes σ(Δr / T) most likely (Guo et al. 2017, §4.2).

    https://arxiv.org/abs/1706.04599, for pairs instead of classes. One parameter, so it cannot
    change which answer is preferred.

    Args:
        differences: Δr of each pair.
        outcomes: 1 where the first answer was preferred, 0 the second, ½ a tie.

    Raises:
        ValueError: there is no pair.
    """
    delta, target = _pairs(differences, outcomes)

    def loss(log_temperature: float) -> float:
        z = delta / math.exp(log_temperature)
        return float(-(target * log_expit(z) + (1 - target) * log_expit(-z)).mean())

    bounds = (-_LOG_TEMPERATURE, _LOG_TEMPERATURE)
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def calibrated_loss(differences: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return the mean log loss of σ(Δr / T) at the temperature that suits these pairs best.

    What remains is what the rewards cannot tell apart; how sure they are does not matter.

    Raises:
        ValueError: there is no pair.
    """
    delta, target = _pairs(differences, outcomes)
    z = delta / fit_temperature(differences, outcomes)
    return float(-(target * log_expit(z) + (1 - target) * log_expit(-z)).mean())


def expected_calibration_error(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 15
) -> float:
    """Return the mean gap between confidence and frequency over bins of equal count.

    ``Σ_b n_b/n · |mean p − mean outcome|``. Both orders of each pair are counted, so that the value
    does not depend on which answer came first.
    """
    p, y = _pairs(probabilities, outcomes)
    return _ece(p, y, bins)


def debiased_calibration_error(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 15
) -> float:
    """Return the calibration error less what a perfectly calibrated model would show at this n.

    The plain error is above 0 for any finite sample. The excess is estimated by drawing outcomes
    from the probabilities themselves (Bröcker and Smith 2007's consistency resampling), 200 times
    with a fixed seed; the result is not below 0.
    """
    p, y = _pairs(probabilities, outcomes)
    rng = np.random.default_rng(0)
    drawn = [
        _ece(p, (rng.random(p.size) < p).astype(np.float64), bins) for _ in range(_SIMULATIONS)
    ]
    return max(0.0, _ece(p, y, bins) - float(np.mean(drawn)))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def mean_error_correlation(errors_EN: Sequence[Sequence[float]]) -> float | None:
    """Return the mean correlation between the errors of two heads; None below two heads or pairs.

    Near 1 the ensemble is one model counted several times, and its spread says little.
    """
    errors = np.asarray(errors_EN, dtype=np.float64)
    if errors.ndim != 2 or errors.shape[0] < 2 or errors.shape[1] < 3:
        return None
    if (errors.std(axis=1) == 0).any():
        return None
    correlation = np.corrcoef(errors)
    upper = np.asarray(correlation)[np.triu_indices(len(errors), 1)]
    return float(upper.mean())


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def probabilities(differences: Sequence[float], temperature: float) -> list[float]:
    """Return σ(Δr / T) of each pair."""
    return [float(p) for p in expit(np.asarray(differences, dtype=np.float64) / temperature)]


def _ece(p: Floats, y: Floats, bins: int) -> float:
    both_p, both_y = np.concatenate([p, 1 - p]), np.concatenate([y, 1 - y])
    order = np.argsort(both_p, kind="stable")
    gaps = [
        len(part) * abs(both_p[part].mean() - both_y[part].mean())
        for part in np.array_split(order, bins)
        if len(part)
    ]
    return float(sum(gaps) / both_p.size)


def _pairs(first: Sequence[float], second: Sequence[float]) -> tuple[Floats, Floats]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size == 0 or a.shape != b.shape:
        raise ValueError(f"needs pairs of numbers, got shapes {a.shape} and {b.shape}")
    return a, b

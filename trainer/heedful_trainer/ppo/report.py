"""What a PPO run shows people: how it went, and whether it optimised its reward too far.

Owns the over-optimisation report (Gao et al. 2022, https://arxiv.org/abs/2210.10760): reward on
held-out prompts against √KL, by one head alone, by the mean and by the least head, whichever was
trained against, and where given by something that training never saw. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heedful_trainer.ppo.loop import PpoResult
from heedful_trainer.ppo.plots import line_plot

Looks = Sequence[Mapping[str, float]]

_READINGS = {
    "reward_single": "one head",
    "reward_mean": "mean of heads",
    "reward_min": "least head",
    "true_taste": "true taste",
}
_SHOWN = ("reward", "kl_nats", "ended_share", "answer_tokens", "mismatch_nats", "beta")


def ppo_evidence(result: PpoResult) -> dict[str, Any]:
    """Return the training as the run's row keeps it."""
    rate = result.tokens / result.seconds if result.seconds else None
    return {
        "steps": result.iterations,
        "skipped_steps": result.skipped_steps,
        "seconds": round(result.seconds, 2),
        "tokens": result.tokens,
        "tokens_per_second": rate,
        "episodes": result.episodes,
        "episodes_per_second": result.episodes / result.seconds if result.seconds else None,
        "ended": result.ended,
        "best_iteration": result.best_iteration,
        "beta": result.beta,
        "looks": [dict(look) for look in result.looks],
        "overoptimisation": overoptimisation(result.looks),
        "history": [dict(row) for row in result.history[-20:]],
    }


def overoptimisation(looks: Looks) -> dict[str, Any]:
    """Return for each reading of the reward its peak and what was lost after it.

    A reading that fell from its peak while the one trained against still rose was over-optimised.
    """
    found: dict[str, Any] = {}
    for key, name in _READINGS.items():
        values = [(look[key], look["sqrt_kl"], look["iteration"]) for look in looks if key in look]
        if values:
            peak, sqrt_kl, iteration = max(values)
            found[key] = {
                "name": name,
                "peak": peak,
                "peak_sqrt_kl": sqrt_kl,
                "peak_iteration": iteration,
                "last": values[-1][0],
                "lost": peak - values[-1][0],
            }
    return found


def plots_of(history: Looks, looks: Looks) -> dict[str, str]:
    """Return the report's images by file name."""
    images = {
        f"ppo_{key}.svg": line_plot(
            key.replace("_", " "),
            "iteration",
            key,
            {"rollouts": [(row["iteration"], row[key]) for row in history if key in row]},
        )
        for key in _SHOWN
    }
    images["ppo_gradients.svg"] = line_plot(
        "gradient norms",
        "iteration",
        "norm",
        {
            key: [(row["iteration"], row[key]) for row in history if key in row]
            for key in ("ppo_norm", "ptx_norm")
        },
    )
    images["ppo_overoptimisation.svg"] = line_plot(
        "held-out prompts: reward against distance",
        "√KL to the reference, nats",
        "reward",
        {
            name: [(look["sqrt_kl"], look[key]) for look in looks if key in look]
            for key, name in _READINGS.items()
            if any(key in look for look in looks)
        },
    )
    return images

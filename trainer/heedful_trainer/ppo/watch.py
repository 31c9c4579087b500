"""When PPO must not go on: what is wrong with a batch, and when looking further brings nothing.

Owns the rules, each with the sentence that a person reads. It stops nothing itself. Pure, any
thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from heedful_trainer.ppo.experience import RewardScale
from heedful_trainer.ppo.settings import PpoSettings

# A divergence is not negative; its estimate may be, by chance.
_DEVIATIONS, _SLACK_NATS = 4.0, 1.0


def problem_with(figures: Mapping[str, float], scale: RewardScale, settings: PpoSettings) -> str:
    """Return why a batch must not be learned from; empty where it may be."""
    broken = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if broken:
        return f"{broken[0]} is not finite"
    if abs(figures["reward"]) > settings.reward.limit:
        return (
            f"the reward exploded: a mean of {figures['reward']:.1f}, beyond "
            f"ppo.reward.limit = {settings.reward.limit:g}"
        )
    least = scale.usual_ended_share * settings.stopping.min_ended_share
    if figures["ended_share"] < least:
        return (
            f"the policy stopped ending its answers: {figures['ended_share']:.0%} end, of the "
            f"reference's {scale.usual_ended_share:.0%}"
        )
    kl, error = figures["sampled_kl_nats"], figures["sampled_kl_error"]
    if kl < -(_DEVIATIONS * error + _SLACK_NATS):
        return (
            f"the KL to the reference is negative ({kl:.2f} ± {error:.2f} nats): the log-probs "
            "that came with the rollouts are not those of what sampled them"
        )
    if figures["kl_nats"] > settings.kl.max_nats:
        nats = figures["kl_nats"]
        return (
            f"the policy left the reference: KL {nats:.1f} nats (√KL {math.sqrt(nats):.1f}), "
            f"beyond ppo.kl.max_nats = {settings.kl.max_nats:g}"
        )
    return ""

"""A look at validation prompts: the reward by every reading of the ensemble, and the KL.

Owns the figures by which a snapshot is chosen and the over-optimisation report is drawn: reward of
one head alone, of the mean and of the least head (Coste et al. 2023,
https://arxiv.org/abs/2310.02743, "worst-case"), all on the scale of the one that is trained
against, beside √KL (Gao et al. 2022, https://arxiv.org/abs/2210.10760). One thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from heedful_trainer.ppo.experience import RewardScale, micro_batches, read, shaped
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.settings import PpoSettings, Reading
from heedful_trainer.rollouts.records import Rollout, rows_of


def look_at(
    networks: Networks, rollouts: Sequence[Rollout], scale: RewardScale, settings: PpoSettings
) -> dict[str, float]:
    """Return the figures of the policy that gave these answers; the backbone wears it."""
    rewards, kl, lengths, ended = [], [], [], []
    for items in micro_batches(rows_of(rollouts), settings.micro_batch_tokens):
        batch = networks.backbone.batch([row for row, _ in items], keep=False)
        rewards.append(networks.rewards(batch))
        kl.append(networks.divergence(batch))
        lengths.append(batch.packed.length_A)
        ended += [rollout.ended for _, group in items for rollout in group]
    rewards_AE, kl_A = torch.cat(rewards), torch.cat(kl)
    length_A, ended_A = torch.cat(lengths), torch.tensor(ended)

    def mean(reading: Reading) -> float:
        rewards_A = read(rewards_AE, reading)
        return float(shaped(rewards_A, ended_A, length_A, scale, settings.reward).mean())

    return {
        "reward_mean": mean("mean"),
        "reward_min": mean("least"),
        "reward_single": mean("single"),
        "disagreement": float(rewards_AE.std(1, correction=0).mean()) * scale.gain,
        "kl_nats": float(kl_A.mean()),
        "sqrt_kl": math.sqrt(max(0.0, float(kl_A.mean()))),
        "ended_share": float(ended_A.double().mean()),
        "answer_tokens": float(length_A.double().mean()),
        "n": float(len(ended)),
    }

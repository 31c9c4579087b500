"""From rollouts to what PPO learns from: rewards, values and advantages for each token.

Owns how a batch is cut (rows of one prompt, minibatches, micro-batches), the pass of all four
networks over it, the scale of the reward, and the figures that say whether the rollouts are sound.
The equations are `advantages`. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful_trainer import advantages, ppo_losses
from heedful_trainer.backbone import Batch
from heedful_trainer.packing import Row, cut
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.settings import PpoSettings, Reading, RewardShaping
from heedful_trainer.rollouts.records import Rollout, rows_of

Item = tuple[Row, tuple[Rollout, ...]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A micro-batch under the four networks: A answers, N tokens of theirs, E heads."""

    batch: Batch
    behaviour_N: Tensor
    old_N: Tensor
    reference_N: Tensor
    values_N: Tensor
    rewards_AE: Tensor
    ended_A: Tensor


@dataclass(frozen=True, slots=True)
class Experience:
    """A micro-batch as the losses take it."""

    batch: Batch
    old_N: Tensor
    old_values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor
    weights_N: Tensor

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.old_N.shape[0])


@dataclass(frozen=True, slots=True)
class RewardScale:
    """The reward is ``gain · reading of the heads + shift``, less the guards."""

    gain: float = 1.0
    shift: float = 0.0
    usual_length: float = 1.0  # mean tokens of the reference's answers
    usual_ended_share: float = 1.0


def minibatches_of(
    rollouts: Sequence[Rollout], settings: PpoSettings, seed: int
) -> list[list[list[Item]]]:
    """Return minibatches of micro-batches of rows, in an order that the seed decides.

    The answers to one prompt stay together. Micro-batches hold rows of like length.
    """
    items = rows_of(rollouts)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(items), generator=generator).tolist()
    count = min(settings.minibatches, len(items))
    size = math.ceil(len(items) / count)
    chosen = [order[start : start + size] for start in range(0, len(items), size)]
    return [micro_batches([items[i] for i in part], settings.micro_batch_tokens) for part in chosen]


def micro_batches(items: Sequence[Item], most_tokens: int) -> list[list[Item]]:
    """Return rows in groups of like length, each of at most so many tokens."""
    groups = cut([row.num_tokens for row, _ in items], most_tokens)
    return [[items[i] for i in group] for group in groups]


def judge(networks: Networks, items: Sequence[Item]) -> Judged:
    """Run the four networks over a micro-batch; what lies below the adapters runs once."""
    batch = networks.backbone.batch([row for row, _ in items], keep=False)
    rollouts = [rollout for _, group in items for rollout in group]
    with torch.no_grad():
        old_N = networks.policy_logprobs(batch)
        values_N = networks.values(batch)
    behaviour = [value for rollout in rollouts for value in rollout.logprobs]
    return Judged(
        batch=batch,
        behaviour_N=torch.tensor(behaviour, dtype=torch.float64).to(old_N.dtype),
        old_N=old_N,
        reference_N=networks.reference_logprobs(batch),
        values_N=values_N,
        rewards_AE=networks.rewards(batch),
        ended_A=torch.tensor([rollout.ended for rollout in rollouts]),
    )


def read(rewards_AE: Tensor, reading: Reading) -> Tensor:
    """Return the reward of each answer, shape [A], as one reading of the ensemble."""
    if reading == "single":
        return rewards_AE[:, 0]
    # Coste et al. 2023 (https://arxiv.org/abs/2310.02743) call the least "worst-case".
    return rewards_AE.amin(1) if reading == "least" else rewards_AE.mean(1)


def fit_scale(judged: Sequence[Judged], shaping: RewardShaping) -> RewardScale:
    """Return the scale of the reading for answers of the reference, with what is usual for them."""
    length_A = torch.cat([part.batch.packed.length_A for part in judged]).double()
    ended_A = torch.cat([part.ended_A for part in judged]).double()
    usual = float(length_A.mean()), float(ended_A.mean())
    if shaping.scale == "model":
        return RewardScale(1.0, 0.0, *usual)
    model_A = read(torch.cat([part.rewards_AE for part in judged]).double(), shaping.reading)
    deviation = float(model_A.std(correction=0)) if len(model_A) > 1 else 1.0
    gain = 1 / deviation if deviation > 1e-6 else 1.0
    return RewardScale(gain, -gain * float(model_A.mean()), *usual)


def shaped(
    rewards_A: Tensor, ended_A: Tensor, length_A: Tensor, scale: RewardScale, shaping: RewardShaping
) -> Tensor:
    """Return rewards as PPO sees them: scaled, less the guards on end and length."""
    return advantages.guarded_rewards(
        scale.gain * rewards_A + scale.shift,
        ended_A,
        length_A,
        missing_end_penalty=shaping.missing_end_penalty,
        usual_length=scale.usual_length,
        length_tolerance=shaping.length_tolerance,
        length_penalty=shaping.length_penalty,
    )


def experience_of(
    judged: Sequence[Judged], scale: RewardScale, beta: float, settings: PpoSettings
) -> tuple[list[Experience], Mapping[str, float]]:
    """Return the whole batch as experience, and its figures."""
    length_A = torch.cat([part.batch.packed.length_A for part in judged])
    ended_A = torch.cat([part.ended_A for part in judged])
    model_A = read(torch.cat([part.rewards_AE for part in judged]), settings.reward.reading)
    reward_A = shaped(model_A, ended_A, length_A, scale, settings.reward)
    old_N = torch.cat([part.old_N for part in judged])
    reference_N = torch.cat([part.reference_N for part in judged])
    values_N = torch.cat([part.values_N for part in judged])
    behaviour_N = torch.cat([part.behaviour_N for part in judged])
    kl_N = advantages.kl_k1(old_N, reference_N)
    advantages_N, returns_N = _advantages(kl_N, reward_A, values_N, length_A, beta, settings)
    weights_N = ppo_losses.behaviour_weights(old_N, behaviour_N)
    figures = _figures(reward_A, model_A, ended_A, length_A)
    figures |= _distances(old_N, reference_N, behaviour_N, length_A.tolist())
    figures["value_error"] = float((returns_N - values_N).square().mean())
    sizes = [part.old_N.shape[0] for part in judged]
    columns = zip(
        *(torch.split(t, sizes) for t in (old_N, values_N, advantages_N, returns_N, weights_N)),
        strict=True,
    )
    found = [Experience(part.batch, *each) for part, each in zip(judged, columns, strict=True)]
    return found, figures


def _advantages(
    kl_N: Tensor,
    reward_A: Tensor,
    values_N: Tensor,
    length_A: Tensor,
    beta: float,
    settings: PpoSettings,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of the tokens, computed over answers side by side."""
    lengths = length_A.tolist()
    mask_BT = torch.arange(max(lengths)) < length_A[:, None]
    advantages_BT, returns_BT = advantages.generalised_advantages(
        advantages.token_rewards(_padded(kl_N, lengths), reward_A, mask_BT, beta=beta),
        _padded(values_N, lengths),
        mask_BT,
        lam=settings.lam,
    )
    advantages_N = advantages_BT[mask_BT]
    if settings.whiten_advantages:
        advantages_N = advantages.whiten(advantages_N)
    return advantages_N, returns_BT[mask_BT]


def _padded(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    return pad_sequence(list(torch.split(values_N, list(lengths))), batch_first=True)


def _figures(
    reward_A: Tensor, model_A: Tensor, ended_A: Tensor, length_A: Tensor
) -> dict[str, float]:
    return {
        "reward": float(reward_A.mean()),
        "reward_deviation": float(reward_A.std(correction=0)),
        "model_reward": float(model_A.mean()),
        "ended_share": float(ended_A.double().mean()),
        "answer_tokens": float(length_A.double().mean()),
    }


def _distances(
    old_N: Tensor, reference_N: Tensor, behaviour_N: Tensor, lengths: Sequence[int]
) -> dict[str, float]:
    """Return how far policy, reference and sampler are from each other.

    ``sampled_kl_nats`` is the unbiased estimate for what really sampled, so that it can be negative
    by chance only; its standard error says how far.
    """
    sampled_A = _sums(behaviour_N - reference_N, lengths)
    policy_A = _sums(old_N - reference_N, lengths)
    k3_A = _sums(advantages.kl_k3(old_N, reference_N), lengths)
    spread = float(sampled_A.std(correction=0)) / math.sqrt(len(lengths))
    return {
        "kl_nats": float(policy_A.mean()),
        "kl_k3_nats": float(k3_A.mean()),
        "sampled_kl_nats": float(sampled_A.mean()),
        "sampled_kl_error": spread,
        "mismatch_nats": float((old_N - behaviour_N).abs().mean()),
        "truncated_weights": float(
            (old_N - behaviour_N > math.log(ppo_losses.LARGEST_WEIGHT)).double().mean()
        ),
    }


def _sums(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([part.sum() for part in torch.split(values_N, list(lengths))])

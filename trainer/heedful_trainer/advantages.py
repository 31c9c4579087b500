"""From one reward at the end of an answer to an advantage for each token, as equations.

Owns the per-token reward with its KL penalty, generalised advantage estimation, whitening, the
guards on an answer's end and length, and the controller of the penalty's weight. It knows neither
models nor files. Notation: ``π`` policy, ``π_ref`` reference, ``β`` weight of the KL, ``V`` value,
``γ`` discount, ``λ`` of GAE. Shapes: ``B`` answers padded on the right to ``T`` tokens; masks are
true for tokens of the answer. Pure, any thread, any float type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return ``log π − log π_ref`` of sampled tokens: unbiased for KL(π ‖ π_ref), of either sign.

    Schulman 2020, http://joschu.net/blog/kl-approx.html. Any shape.
    """
    assert logprobs.shape == reference.shape
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return ``exp(r) − 1 − r`` with ``r = log π_ref − log π``: unbiased and never negative.

    Same source as ``kl_k1``; smaller variance where the two are close, larger in the tails.
    """
    assert logprobs.shape == reference.shape
    r = reference - logprobs
    return torch.expm1(r) - r


def token_rewards(kl_BT: Tensor, reward_B: Tensor, mask_BT: Tensor, *, beta: float) -> Tensor:
    """Return ``−β kl_t``, plus the answer's reward at its last token (Ouyang et al. 2022, C.4).

    https://arxiv.org/abs/2203.02155, eq. 2 written for each token. The KL is a cost here and not a
    part of the loss, so that a token pays for what follows from it.

    Args:
        kl_BT: ``kl_k1`` of each token, without gradient.
        reward_B: of whole answers.
        mask_BT: every answer has at least one token.
        beta: β ≥ 0.

    Returns:
        Rewards, shape [B, T], 0 outside the mask.
    """
    _require_mask(kl_BT, mask_BT)
    assert reward_B.shape == kl_BT.shape[:1]
    rewards_BT = torch.where(mask_BT, -beta * kl_BT, torch.zeros_like(kl_BT))
    last_B = mask_BT.sum(1) - 1
    rewards_BT[torch.arange(len(last_B)), last_B] += reward_B.to(rewards_BT.dtype)
    return rewards_BT


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, lam: float, discount: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (Schulman et al. 2015, eq. 16).

    https://arxiv.org/abs/1506.02438: ``δ_t = r_t + γ V_{t+1} − V_t``, ``A_t = δ_t + γλ A_{t+1}``,
    and the return to regress on is ``A_t + V_t``. Our notation: ``V_t`` is the value before token
    t, nothing follows an answer's last token, and γ is 1, as in InstructGPT, unless given.

    Args:
        rewards_BT: of ``token_rewards``.
        values_BT: V before each token, without gradient.
        mask_BT: true from the first token of an answer to its last.
        lam: λ; 1 gives the Monte Carlo return less the value, 0 the one-step error.
        discount: γ.

    Returns:
        Both [B, T], 0 outside the mask.
    """
    _require_mask(rewards_BT, mask_BT)
    _require_mask(values_BT, mask_BT)
    zeros_BT = torch.zeros_like(rewards_BT)
    rewards_BT = torch.where(mask_BT, rewards_BT, zeros_BT)
    values_BT = torch.where(mask_BT, values_BT, zeros_BT)
    advantages_BT = zeros_BT.clone()
    next_value_B = advantage_B = zeros_BT[:, 0]
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        # Outside the mask rewards and values are 0, so these stay 0 until the answer's last token.
        delta_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        advantage_B = delta_B + discount * lam * advantage_B
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = advantage_B
    return advantages_BT, advantages_BT + values_BT


def whiten(values: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Return values scaled to variance 1, with mean 0 or (for rewards) with the mean they have.

    Without the shift the sign of a reward survives (Ziegler et al. 2019). A single value, or equal
    ones, have no scale and are only shifted.
    """
    mean = values.mean()
    scale = torch.rsqrt(values.var(correction=0) + epsilon) if values.numel() > 1 else 1.0
    scaled = (values - mean) * scale
    return scaled if shift_mean else scaled + mean


def guarded_rewards(
    reward_B: Tensor,
    ended_B: Tensor,
    length_B: Tensor,
    *,
    missing_end_penalty: float,
    usual_length: float,
    length_tolerance: float,
    length_penalty: float,
) -> Tensor:
    """Return rewards less what never ending and growing longer cost.

    A reward model that has only seen ended answers says nothing about one that was cut (Huang et
    al. 2024, https://arxiv.org/abs/2403.17031, the "EOS trick"), and most like length for its own
    sake. Our form: a fixed cost for the one; for the other
    ``penalty · max(0, log(length / (tolerance · usual)))``.

    Args:
        reward_B: in the units of the penalties.
        ended_B: true where an answer ended of itself.
        length_B: tokens.
        missing_end_penalty: cost of an answer that was cut.
        usual_length: mean tokens of the reference's answers.
        length_tolerance: how many times that is free.
        length_penalty: cost of e times more than is free.
    """
    assert reward_B.shape == ended_B.shape == length_B.shape
    excess_B = (length_B.to(reward_B.dtype) / (length_tolerance * usual_length)).log().clamp(min=0)
    cut_B = (~ended_B.bool()).to(reward_B.dtype)
    return reward_B - missing_end_penalty * cut_B - length_penalty * excess_B


@dataclass(frozen=True, slots=True)
class KlController:
    """The weight β of the KL, fixed or steered to a target (Ziegler et al. 2019, §2.2).

    https://arxiv.org/abs/1909.08593: ``e = clip(KL / target − 1, ±0.2)``, ``β ← β (1 + 0.1 e)``.
    """

    beta: float
    target_nats: float = 0.0  # sum over the tokens of an answer; 0 keeps β as it is

    def updated(self, kl_nats: float) -> KlController:
        """Return the controller after an iteration whose mean KL was this."""
        if not self.target_nats:
            return self
        error = max(-0.2, min(0.2, kl_nats / self.target_nats - 1))
        return replace(self, beta=self.beta * (1 + 0.1 * error))


def _require_mask(values_BT: Tensor, mask_BT: Tensor) -> None:
    assert values_BT.ndim == 2, f"expected 2 dimensions, got shape {tuple(values_BT.shape)}"
    assert values_BT.shape == mask_BT.shape, f"{values_BT.shape} and {mask_BT.shape} differ"
    assert mask_BT.dtype == torch.bool

"""The two losses of PPO as equations: the clipped policy loss and the clipped value loss.

Owns the maths only, each function pure and differentiable, a loss for each token: what they are
averaged over is the loop's matter. It knows neither models nor rollouts. Notation: ``π`` policy,
``π_old`` the policy when its advantages were estimated, ``μ`` what really sampled the tokens (the
server, perhaps quantised, perhaps one update behind). Tensors of one call share one shape. Any
thread, any float type.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_WEIGHT = 2.0


def behaviour_weights(old: Tensor, behaviour: Tensor, *, largest: float = LARGEST_WEIGHT) -> Tensor:
    """Return ``min(π_old / μ, largest)`` of each token, without gradient.

    Truncated importance sampling (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, ρ̄): it
    corrects for a sampler that is not the policy, and the bound keeps one rare token from ruling a
    step. Only for tokens sampled without truncation: a token that could not be drawn has no weight.

    Args:
        old: log π_old of the sampled tokens.
        behaviour: log μ of the same tokens, as stored when they were drawn.
        largest: the bound, ≥ 1.
    """
    _require_shape(old, behaviour)
    return (old - behaviour).detach().exp().clamp(max=largest)


def policy_losses(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Return each token's clipped surrogate loss (Schulman et al. 2017, eq. 7).

    https://arxiv.org/abs/1707.06347: ``−min(ρ A, clip(ρ, 1 ± ε) A)`` with ``ρ = π / π_old``, times
    the token's weight. Where ρ = 1 its gradient is that of ``−A log π``, the policy gradient.

    Args:
        logprobs: log π, with gradient.
        old: log π_old.
        advantages: A, whitened or not.
        clip: ε.
        weights: of ``behaviour_weights``; 1 where absent. A token of weight 0 takes no part,
            whatever its other values are.
    """
    _require_shape(logprobs, old)
    _require_shape(logprobs, advantages)
    ratio = (logprobs - old).exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return losses if weights is None else _weighted(losses, weights)


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> Tensor:
    """Return each token's value loss, ``½ max((V − R)², (V_clipped − R)²)``.

    ``V_clipped`` is within ``clip`` of the value before the update: so that one batch cannot throw
    the values off. None regresses plainly.
    """
    _require_shape(values, old_values)
    _require_shape(values, returns)
    errors = (values - returns).square()
    if clip is None:
        return errors / 2
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum(errors, (near - returns).square()) / 2


def clipped_share(logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """Return the share of tokens whose gradient the clip cuts off."""
    ratio = (logprobs - old).exp()
    beyond = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return beyond.to(logprobs.dtype).mean()


def _weighted(losses: Tensor, weights: Tensor) -> Tensor:
    _require_shape(losses, weights)
    # where, not only a product: the loss of a token without a part may be inf, and 0 · inf is nan.
    return torch.where(weights > 0, losses, torch.zeros_like(losses)) * weights


def _require_shape(first: Tensor, other: Tensor) -> None:
    assert first.shape == other.shape, f"{tuple(first.shape)} and {tuple(other.shape)} differ"

"""The losses of a reward model, as equations: rankings with ties, thumbs, corrections.

Owns the maths only, each function pure and differentiable: rewards in, losses out. It knows
neither models nor datasets. ``r`` is the reward of an answer, ``K`` the answers to one prompt,
``P`` their C(K,2) pairs, ``E`` heads of an ensemble. Any thread, any float type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_indices(num_answers: int) -> tuple[Tensor, Tensor]:
    """Return the first and second index of all C(K,2) pairs, shape [P] each."""
    pairs = torch.combinations(torch.arange(num_answers), 2)
    return pairs[:, 0], pairs[:, 1]


def davidson_logprobs(difference: Tensor, log_nu: Tensor | None) -> Tensor:
    """Return log P(first better), log P(second better), log P(tie) of a reward difference.

    Davidson (1970), with p = e^r: ``P(i ≻ j) = p_i / (p_i + p_j + ν √(p_i p_j))`` and
    ``P(i ~ j) = ν √(p_i p_j) / (…)``. Divided by √(p_i p_j), this is a softmax over
    ``(Δ/2, −Δ/2, log ν)``. Without ν it is Bradley and Terry's model and a tie has no probability.

    Args:
        difference: Δ = r_i − r_j, any shape.
        log_nu: log ν, a scalar tensor; None for the model without ties.

    Returns:
        Shape [..., 3].
    """
    assert difference.is_floating_point()
    half = difference / 2
    if log_nu is None:
        decided = torch.stack([half, -half], dim=-1).log_softmax(dim=-1)
        none = torch.full_like(difference, -torch.inf).unsqueeze(-1)
        return torch.cat([decided, none], dim=-1)
    assert log_nu.ndim == 0
    return torch.stack([half, -half, log_nu.expand_as(half)], dim=-1).log_softmax(dim=-1)


def ranking_loss(
    rewards_K: Tensor, ranks_K: Tensor, log_nu: Tensor | None = None, *, drop_ties: bool = False
) -> Tensor:
    """Return the mean loss over all C(K,2) pairs of one ranking, which is one batch element.

    Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155), with ties kept by Davidson's
    model where the paper drops them. Our notation: ``ranks`` are small for good answers and equal
    for tied ones. Without ν a tie counts as half a win each way.

    Args:
        rewards_K: r of each answer; [K] or [K, E] for several heads at once.
        ranks_K: rank of each answer, lower is better, int64.
        log_nu: log ν.
        drop_ties: leave tied pairs out of the mean, as the paper does; 0 where all are tied.

    Returns:
        A scalar, or shape [E].
    """
    assert ranks_K.ndim == 1
    assert rewards_K.shape[0] == ranks_K.shape[0] >= 2
    first, second = pair_indices(ranks_K.shape[0])
    difference = rewards_K[first] - rewards_K[second]
    sign_P = torch.sign(ranks_K[second] - ranks_K[first])
    sign = sign_P.reshape(-1, *([1] * (difference.ndim - 1))).expand_as(difference)
    logprobs = davidson_logprobs(difference, log_nu)
    first_wins, second_wins, tie = logprobs.unbind(-1)
    if log_nu is None:
        tie = (first_wins + second_wins) / 2
    loss = -torch.where(sign > 0, first_wins, torch.where(sign < 0, second_wins, tie))
    if drop_ties:
        decided = sign != 0
        loss = torch.where(decided, loss, torch.zeros_like(loss))
        return loss.sum(dim=0) / decided.sum(dim=0).clamp(min=1)
    return loss.mean(dim=0)


def initial_log_nu(num_ties: int, num_pairs: int) -> float | None:
    """Return log ν at which equal answers tie as often as was seen; None where no pair tied.

    At Δ = 0 a tie has probability ν / (2 + ν); a log of ties alone is taken as nine of ten.
    """
    if not num_ties:
        return None
    share = min(num_ties / num_pairs, 0.9)
    return float(torch.tensor(2 * share / (1 - share)).log())


def thumb_loss(rewards: Tensor, up_N: Tensor, prompt_N: Tensor, intercept: Tensor) -> Tensor:
    """Return the cross-entropy of each thumb, its reward centred within the prompt.

    ``BCE(σ(r − r̄_x − τ), up)`` where r̄_x is the mean reward of the rated answers to the same
    prompt: easy prompts gather thumbs up whatever was answered, and that must not be learned. The
    centre is used only where the siblings disagree; an answer alone keeps its reward.

    Args:
        rewards: r of each rated answer, [N] or [N, E].
        up_N: true for a thumb up.
        prompt_N: index of each answer's prompt, int64.
        intercept: τ, a scalar: how high the bar of these raters is.

    Returns:
        Loss of each thumb, the shape of ``rewards``.
    """
    assert up_N.ndim == prompt_N.ndim == 1
    assert rewards.shape[0] == up_N.shape[0]
    num_prompts = int(prompt_N.max()) + 1 if prompt_N.numel() else 0
    shape = (-1, *([1] * (rewards.ndim - 1)))
    up = up_N.to(rewards.dtype)
    ones = torch.ones_like(up)
    count = ones.new_zeros(num_prompts).index_add(0, prompt_N, ones)
    ups = ones.new_zeros(num_prompts).index_add(0, prompt_N, up)
    total = rewards.new_zeros((num_prompts, *rewards.shape[1:])).index_add(0, prompt_N, rewards)
    mean = (total / count.clamp(min=1).reshape(shape))[prompt_N]
    disagree = ((ups > 0) & (ups < count))[prompt_N].reshape(shape)
    centred = torch.where(disagree, rewards - mean, rewards - intercept)
    return F.binary_cross_entropy_with_logits(
        centred, up.reshape(shape).expand_as(centred), reduction="none"
    )


def all_bad_loss(rewards_K: Tensor, intercept: Tensor) -> Tensor:
    """Return the loss of "none of these is acceptable": the mean of K thumbs-down.

    Not centred, since the judgement is about the prompt's answers together. [K] or [K, E].
    """
    assert rewards_K.shape[0] >= 1
    return F.softplus(rewards_K - intercept).mean(dim=0)


def correction_loss(corrected: Tensor, served: Tensor, edit_distance: float) -> Tensor:
    """Return the loss of a person's rewrite against the answer that was served.

    ``softplus(−(r(x, y_corrected) − r(x, y_served) − m))`` with a margin m that grows with the
    normalised edit distance: a rewrite from scratch says more than a fixed comma.

    Args:
        corrected: r of the rewrite, any shape.
        served: r of the answer that was served, the same shape.
        edit_distance: 0 (nothing changed) to 1 (nothing kept); also m, in nats.
    """
    assert corrected.shape == served.shape
    if not 0.0 <= edit_distance <= 1.0:
        raise ValueError(f"edit_distance must be in [0, 1], got {edit_distance}")
    return F.softplus(-(corrected - served - edit_distance))


def mean_zero_shift(rewards: Tensor) -> Tensor:
    """Return what to subtract so that these rewards have mean 0 (Ouyang et al. 2022, C.2).

    Args:
        rewards: of people's demonstrations, or of all answers where there are none; [N] or [N, E].
    """
    assert rewards.shape[0] >= 1
    return rewards.mean(dim=0)

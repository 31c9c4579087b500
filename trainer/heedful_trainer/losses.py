"""The losses that move a policy, as equations: SFT, DPO, KTO, and the sums of log-probs they need.

Owns the maths only, each function pure and differentiable: log-probs in, losses out. It knows
neither models nor datasets; the losses of a reward model are in ``reward_losses``. Notation:
``π`` policy, ``π_ref`` the reference (where training starts), ``y_w``/``y_l`` the preferred and
the other answer to ``x``; log-probs are natural and summed over the tokens of an answer. Shapes:
``B`` examples, ``T`` tokens, ``N`` tokens of all answers in a row. Any thread, any float type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logprobs(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum the log-probs of each answer's own tokens.

    Args:
        logprobs_BT: log π(y_t | x, y_<t) at every position.
        mask_BT: true (or 1) for tokens of the answer, false for prompt and padding.

    Returns:
        log π(y | x), shape [B].
    """
    _require_shape(logprobs_BT, mask_BT, 2)
    # where, not a product: a padded position may hold -inf, and 0 · inf is not a number.
    return torch.where(mask_BT.bool(), logprobs_BT, torch.zeros_like(logprobs_BT)).sum(dim=1)


def segment_logprobs(logprobs_N: Tensor, owner_N: Tensor, num_answers: int) -> Tensor:
    """Sum log-probs that lie in one row, each by the answer that owns it.

    Args:
        logprobs_N: log-probs of the tokens of all answers, in any order.
        owner_N: index of each token's answer, int64.
        num_answers: how many answers there are; one without tokens sums to 0.

    Returns:
        Sums, shape [num_answers].
    """
    _require_shape(logprobs_N, owner_N, 1)
    zeros = logprobs_N.new_zeros(num_answers)
    return zeros.index_add(0, owner_N, logprobs_N)


def sft_loss(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the answers' tokens (Ouyang et al. 2022, C.1).

    https://arxiv.org/abs/2203.02155. Every token counts the same, so a long answer weighs more than
    a short one. Args as of ``sequence_logprobs``; without any token the loss is 0.
    """
    total = sequence_logprobs(logprobs_BT, mask_BT).sum()
    return -total / mask_BT.sum().clamp(min=1)


def dpo_margin(
    policy_w_B: Tensor, policy_l_B: Tensor, reference_w_B: Tensor, reference_l_B: Tensor
) -> Tensor:
    """Return how much more than the reference the policy prefers y_w over y_l, in nats.

    ``[log π(y_w) − log π_ref(y_w)] − [log π(y_l) − log π_ref(y_l)]`` (Rafailov et al. 2023, eq. 7);
    swapping the answers negates it. Divide each log-prob by its answer's length beforehand for the
    length-normalised form.
    """
    for other in (policy_l_B, reference_w_B, reference_l_B):
        _require_shape(policy_w_B, other, 1)
    return (policy_w_B - reference_w_B) - (policy_l_B - reference_l_B)


def dpo_loss(
    margin_B: Tensor,
    *,
    beta: float,
    target_B: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return each pair's direct preference loss, with soft labels (Rafailov et al. 2023).

    https://arxiv.org/abs/2305.18290, eq. 7; with ``label_smoothing`` ε it is conservative DPO
    (Mitchell 2023). Our notation: ``p`` is the probability that the first answer is the better one,
    so that ``−p log σ(βm) − (1 − p) log σ(−βm)``; a tie is ``p = ½``, whose loss is least at m = 0,
    as under Davidson's model.

    Args:
        margin_B: of ``dpo_margin``.
        beta: weight of the reference; larger stays nearer to it.
        target_B: p for each pair; all 1 where it is absent.
        label_smoothing: ε in [0, ½): p becomes p(1 − ε) + (1 − p)ε.

    Returns:
        Loss of each pair, shape [B].
    """
    assert margin_B.ndim == 1
    assert margin_B.is_floating_point()
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    target_B = torch.ones_like(margin_B) if target_B is None else target_B.to(margin_B.dtype)
    _require_shape(margin_B, target_B, 1)
    p_B = target_B * (1 - label_smoothing) + (1 - target_B) * label_smoothing
    return -p_B * F.logsigmoid(beta * margin_B) - (1 - p_B) * F.logsigmoid(-beta * margin_B)


def kto_reference_point(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) from prompts paired with the answers of other prompts.

    ``z0 = max(0, mean(log π(y'|x) − log π_ref(y'|x)))``, without gradient, as HALOs and TRL do
    (Ethayarajh et al. 2024, §4.1, https://arxiv.org/abs/2402.01306): mismatched answers estimate
    how far the policy has moved in general.
    """
    _require_shape(policy_B, reference_B, 1)
    return (policy_B - reference_B).mean().clamp(min=0).detach()


def kto_loss(
    policy_B: Tensor,
    reference_B: Tensor,
    desirable_B: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return each answer's Kahneman-Tversky loss from thumbs alone (Ethayarajh et al. 2024).

    https://arxiv.org/abs/2402.01306, eq. 8: ``λ_D (1 − σ(β(m − z0)))`` for a desirable answer and
    ``λ_U (1 − σ(β(z0 − m)))`` for another, with ``m = log π(y|x) − log π_ref(y|x)``.

    Args:
        policy_B: log π(y|x).
        reference_B: log π_ref(y|x).
        desirable_B: true for a thumb up.
        reference_point: z0, a scalar; see ``kto_reference_point``.
        beta: weight of the reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        Loss of each answer, shape [B].
    """
    _require_shape(policy_B, reference_B, 1)
    _require_shape(policy_B, desirable_B, 1)
    assert reference_point.ndim == 0
    distance_B = beta * (policy_B - reference_B - reference_point)
    up_B = desirable_weight * (1 - torch.sigmoid(distance_B))
    down_B = undesirable_weight * (1 - torch.sigmoid(-distance_B))
    return torch.where(desirable_B.bool(), up_B, down_B)


def kto_weights(num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """Return (λ_D, λ_U) that balance the classes: n_D λ_D / (n_U λ_U) in [1, 4/3].

    The rule of the paper's §4.2; the rarer class is raised and neither weight is below 1.
    """
    if not num_desirable or not num_undesirable:
        return 1.0, 1.0
    ratio = num_desirable / num_undesirable
    if ratio < 1:
        return 1 / ratio, 1.0
    if ratio > 4 / 3:
        return 1.0, ratio / (4 / 3)
    return 1.0, 1.0


def _require_shape(first: Tensor, other: Tensor, ndim: int) -> None:
    assert first.ndim == ndim, f"expected {ndim} dimensions, got shape {tuple(first.shape)}"
    assert first.shape == other.shape, f"{tuple(first.shape)} and {tuple(other.shape)} differ"

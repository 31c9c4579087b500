"""Log-probs of given tokens straight from hidden states, in chunks: no [N, V] tensor is kept.

Owns the fused linear → log-softmax → gather and its gradient to the hidden states (the head is
frozen). It knows nothing of models or losses. The formula is the reference for every other form of
it. Any thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# 128 rows of a 49k vocabulary are 25 MB of fp32 logits: near the size of a last-level cache.
CHUNK_ROWS = 128


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, tokens_N: Tensor) -> Tensor:
        logprobs, directions = [], []
        for rows in _chunks(hidden_NH.shape[0]):
            logits_RV = _logits(hidden_NH[rows], weight_VH)
            lse_R = logits_RV.logsumexp(-1)
            logprobs.append(logits_RV.gather(1, tokens_N[rows, None])[:, 0] - lse_R)
            if ctx.needs_input_grad[0]:
                # d log p_t / d h = W_t − softmax W: a row's gradient is this times a number, so it
                # is found here once, and nothing of size V has to be kept or computed again.
                softmax_RV = logits_RV.sub_(lse_R[:, None]).exp_().to(weight_VH.dtype)
                directions.append(weight_VH[tokens_N[rows]] - softmax_RV @ weight_VH)
        ctx.save_for_backward(torch.cat(directions) if directions else hidden_NH)
        return torch.cat(logprobs) if logprobs else _wide(hidden_NH.new_zeros(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (direction_NH,) = ctx.saved_tensors
        return direction_NH * grads[0][:, None].to(direction_NH.dtype), None, None


def token_logprobs(hidden_NH: Tensor, weight_VH: Tensor, tokens_N: Tensor) -> Tensor:
    """Return log softmax(h Wᵀ)[token] for each row, differentiable in ``hidden_NH`` only.

    Args:
        hidden_NH: final hidden states at the positions before the tokens.
        weight_VH: the language-model head, frozen, of the same type.
        tokens_N: token ids, int64.

    Returns:
        Log-probs, shape [N], fp32 (fp64 for fp64 inputs).
    """
    assert hidden_NH.ndim == weight_VH.ndim == 2
    assert tokens_N.shape == hidden_NH.shape[:1]
    assert hidden_NH.dtype == weight_VH.dtype
    assert not weight_VH.requires_grad, "the head is frozen"
    result: Tensor = _TokenLogprob.apply(hidden_NH, weight_VH, tokens_N)  # type: ignore[no-untyped-call]
    return result


def token_kl(hidden_NH: Tensor, other_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats at each position, over the whole vocabulary, without gradient.

    Args:
        hidden_NH: hidden states that give p.
        other_NH: hidden states that give q.
        weight_VH: the language-model head of both.
    """
    assert hidden_NH.shape == other_NH.shape
    parts = []
    with torch.no_grad():
        for rows in _chunks(hidden_NH.shape[0]):
            p_RV = _logits(hidden_NH[rows], weight_VH).log_softmax(-1)
            q_RV = _logits(other_NH[rows], weight_VH).log_softmax(-1)
            parts.append((p_RV.exp() * (p_RV - q_RV)).sum(-1))
    return torch.cat(parts) if parts else hidden_NH.new_zeros(0)


def _logits(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
    return _wide(hidden_RH @ weight_VH.T)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(num_rows: int) -> list[slice]:
    return [slice(i, min(i + CHUNK_ROWS, num_rows)) for i in range(0, num_rows, CHUNK_ROWS)]

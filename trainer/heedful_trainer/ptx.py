"""PPO-ptx: the language-model gradient beside PPO's, in one optimiser step.

Owns the normalisation of the ptx loss, the accumulation of two gradients with their norms, and the
coefficient between them. The paper (Ouyang et al. 2022, C.4, https://arxiv.org/abs/2203.02155) says
"we compute the PPO gradients and pretraining gradients in consecutive steps and accumulate them":
one step of Adam over ``g_ppo + γ g_ptx``. Two steps of Adam are something else: they share one
second moment, which makes the ptx step almost blind to γ and shrinks PPO's.

**Convention.** The paper leaves open whether log-likelihoods are summed or averaged. Here both
losses are means over tokens: PPO's over the answer tokens of a minibatch, ptx's over the predicted
tokens of its texts. γ = 27.8 means 27.8 under that convention. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]


def ptx_loss(logprobs_N: Tensor, num_tokens: int | None = None) -> Tensor:
    """Return ``−mean log π(x_t | x_<t)`` over the tokens of texts.

    Args:
        logprobs_N: of each predicted token.
        num_tokens: of the whole batch, where this is a part of it; the parts' losses then add up
            to the batch's.
    """
    assert logprobs_N.ndim == 1
    return -logprobs_N.sum() / (num_tokens or max(1, logprobs_N.shape[0]))


def take_gradients(parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """Return what was accumulated, and clear it; zeros where there is nothing."""
    taken: Gradients = {}
    for name, parameter in parameters.items():
        taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return taken


def global_norm(gradients: Gradients) -> float:
    """Return the Euclidean norm over all tensors."""
    norms = [torch.linalg.vector_norm(value) for value in gradients.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@dataclass(frozen=True, slots=True)
class PtxWeight:
    """How much of the ptx gradient is added.

    By ratio, ``γ`` follows the gradients: ``γ ‖g_ptx‖ = ratio ‖g_ppo‖``, never above ``largest``.
    So it means the same for every model and batch, and where the ptx gradient is nothing but noise
    (at the reference, whose own text it is, its mean is zero) the bound keeps it small. Without a
    ratio, γ is taken as it is.
    """

    ratio: float | None
    gamma: float  # literal, where there is no ratio
    largest: float = 27.8

    @property
    def is_off(self) -> bool:
        """True where ptx takes no part."""
        return self.gamma == 0 if self.ratio is None else self.ratio == 0

    def coefficient(self, ppo_norm: float, ptx_norm: float) -> float:
        """Return γ for gradients of these norms."""
        if self.ratio is None:
            return self.gamma
        if not (math.isfinite(ppo_norm) and math.isfinite(ptx_norm)) or ptx_norm == 0:
            return 0.0
        return min(self.largest, self.ratio * ppo_norm / ptx_norm)


def accumulate(
    parameters: Mapping[str, nn.Parameter], ppo: Gradients, ptx: Gradients, coefficient: float
) -> None:
    """Set the gradient of each parameter to ``g_ppo + γ g_ptx``, for one optimiser step."""
    for name, parameter in parameters.items():
        parameter.grad = torch.add(ppo[name], ptx[name], alpha=coefficient)

"""The CPU way of token_logprob: tiles of torch operators that stay near the cache.

Owns `Tiled`, the autograd function that `token_logprob.py` (formulas there) calls on a CPU, in fp64
and wherever the Triton kernel cannot run. Tiles are few and large, because each operator on one is
a barrier between threads. Gradients of a frozen head's input cost no second walk: dlogp_t is one
number a token, so forward already adds up w_y(t) - sum_v p_tv w_v and backward only scales it. In
bf16, x - x_y is computed with one rounding, which leaves the logits near the token's own more exact
than rounding x would. Sums are fp32 (fp64 in fp64). Pure functions, any thread.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_LOG2E: Final = math.log2(math.e)
_LN2: Final = math.log(2.0)
# A tile is 16 MiB in fp32. Smaller ones stay nearer to a core but cost more barriers, which is what
# hurts on a machine that serves while it trains.
_CPU_ROWS: Final = 1024
_CPU_COLUMNS: Final = 4096
_CAREFUL_ROWS: Final = 32
# Sums of exponentials above this have lost, or are about to lose, what matters.
_OVERFLOW: Final = 1e30


class Tiled(torch.autograd.Function):
    """Walks over tiles of logits; keeps [T] and, for gradients, [T, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        inverse_temperature: float,
        entropy: bool,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (zeros unless asked for), [T]."""
        num_tokens = len(hidden_TH)
        saved = _Saved.empty(hidden_TH, entropy=entropy, gradients=wants_grad)
        for start in range(0, num_tokens, _CPU_ROWS):
            rows = slice(start, min(start + _CPU_ROWS, num_tokens))
            block = (hidden_TH[rows], weight_VH, targets_T[rows], inverse_temperature)
            walk = _Walk(*block, entropy=entropy, gradients=wants_grad)
            walk.run(_CPU_COLUMNS)
            walk.store(saved, rows)
            for first in range(0, len(walk.overflown), _CAREFUL_ROWS):
                few_R = walk.overflown[first : first + _CAREFUL_ROWS]
                _store_carefully(block, few_R, saved, few_R + start)
        ctx.inverse_temperature, ctx.entropy = inverse_temperature, entropy
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, *saved)
        return saved.logp_T.masked_fill(targets_T < 0, 0.0), saved.entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: Tensor, grad_entropy_T: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and weight."""
        hidden_TH, weight_VH, targets_T = ctx.saved_tensors[:3]
        saved = _Saved(*ctx.saved_tensors[3:])
        grad_logp_T = grad_logp_T.masked_fill(targets_T < 0, 0.0)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_TH = saved.logp_pull_TH * grad_logp_T[:, None]
            if ctx.entropy:
                grad_TH.addcmul_(saved.entropy_pull_TH, grad_entropy_T[:, None])
            grad_hidden = grad_TH.to(hidden_TH.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(
                (hidden_TH, weight_VH, targets_T),
                saved,
                grad_logp_T,
                grad_entropy_T if ctx.entropy else None,
                ctx.inverse_temperature,
            )
        return grad_hidden, grad_weight, None, None, None, None


class _Saved(NamedTuple):
    """Results of a call, [T], and what backward scales, [T, H]; empty where not wanted."""

    logp_T: Tensor
    lse_T: Tensor
    entropy_T: Tensor
    logp_pull_TH: Tensor  # d logp / d hidden
    entropy_pull_TH: Tensor  # d entropy / d hidden

    @classmethod
    def empty(cls, hidden_TH: Tensor, *, entropy: bool, gradients: bool) -> _Saved:
        """Room for the results."""
        zeros_T = hidden_TH.new_zeros(len(hidden_TH), dtype=_wide(hidden_TH))
        pulls_TH = hidden_TH.new_empty(hidden_TH.shape, dtype=_wide(hidden_TH))
        return cls(
            zeros_T,
            zeros_T.clone(),
            zeros_T.clone(),
            pulls_TH if gradients else pulls_TH[:0],
            torch.empty_like(pulls_TH) if gradients and entropy else pulls_TH[:0],
        )


class _Walk:
    """One block of tokens on its way over the vocabulary.

    Exponents are in units of log 2 and relative to the token's own logit, so that neither a running
    maximum nor a rescaling is needed: only a token about 80 nats below the best one overflows, and
    such rows are listed in `overflown` for the careful way.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        inverse_temperature: float,
        *,
        entropy: bool,
        gradients: bool,
    ) -> None:
        self._hidden_TH, self._weight_VH = hidden_TH, weight_VH
        self._scale = inverse_temperature
        self._own_TH = weight_VH.index_select(0, targets_T.clamp(min=0)).to(_wide(hidden_TH))
        self._exponent_T = (hidden_TH * self._own_TH).sum(dim=1).mul_(_LOG2E * self._scale)
        # Rounded, so that what a product subtracts in its own dtype is known exactly.
        self._shift_T = self._exponent_T.to(hidden_TH.dtype)
        self._sum_T = torch.zeros_like(self._exponent_T)
        self._dot_T = torch.zeros_like(self._sum_T) if entropy else None
        self._mass_TH = torch.zeros_like(self._own_TH) if gradients else None
        self._dot_TH = torch.zeros_like(self._own_TH) if gradients and entropy else None
        self.overflown = targets_T[:0]

    def run(self, num_columns: int) -> None:
        """Visit every tile; afterwards store() may be called."""
        for start in range(0, len(self._weight_VH), num_columns):
            self._visit(self._weight_VH[start : start + num_columns])
        self.overflown = (~(self._sum_T < _OVERFLOW)).nonzero()[:, 0]

    def store(self, saved: _Saved, rows: slice) -> None:
        """Write this block's rows of all results; those of overflown rows mean nothing."""
        log2_sum_T = self._sum_T.log2()
        shift_T = self._shift_T.to(self._sum_T.dtype)
        offset_T = self._exponent_T - shift_T
        saved.logp_T[rows] = (offset_T - log2_sum_T).mul_(_LN2).clamp_(max=0.0)
        saved.lse_T[rows] = (shift_T + log2_sum_T).mul_(_LN2)
        if self._dot_T is not None:
            saved.entropy_T[rows] = (log2_sum_T - self._dot_T / self._sum_T).mul_(_LN2)
        sum_T1 = self._sum_T[:, None]
        if self._mass_TH is not None:
            mean_TH = self._mass_TH / sum_T1
            saved.logp_pull_TH[rows] = self._own_TH.sub_(mean_TH).mul_(self._scale)
            if self._dot_TH is not None:
                assert self._dot_T is not None
                # sum_v p_v (mean exponent - exponent_v) w_v
                pull_TH = mean_TH.mul_(self._dot_T[:, None]).sub_(self._dot_TH).div_(sum_T1)
                saved.entropy_pull_TH[rows] = pull_TH.mul_(_LN2 * self._scale)

    def _visit(self, weight_CH: Tensor) -> None:
        hidden_TH = self._hidden_TH
        if hidden_TH.dtype == torch.float16:
            # Unnormalised masses do not fit into fp16.
            hidden_TH, weight_CH = hidden_TH.float(), weight_CH.float()
        x_TC = _exponents(hidden_TH, weight_CH, self._shift_T, self._scale)
        # exp2 is several times faster than exp in torch's CPU builds.
        p_TC = torch.exp2(x_TC) if self._dot_T is not None else x_TC.exp2_()
        self._sum_T += p_TC.sum(dim=1)
        if self._mass_TH is not None:
            self._mass_TH += p_TC.to(weight_CH.dtype) @ weight_CH
        if self._dot_T is not None:
            p_TC.mul_(x_TC)
            self._dot_T += p_TC.sum(dim=1)
            if self._dot_TH is not None:
                self._dot_TH += p_TC.to(weight_CH.dtype) @ weight_CH


def _exponents(
    hidden_TH: Tensor, weight_CH: Tensor, shift_T: Tensor, inverse_temperature: float
) -> Tensor:
    """Logits in units of log 2, minus shift, with one rounding to the operands' dtype."""
    minus_TC = (-shift_T.to(hidden_TH.dtype))[:, None].expand(-1, len(weight_CH))
    x_TC = torch.addmm(minus_TC, hidden_TH, weight_CH.T, alpha=_LOG2E * inverse_temperature)
    return x_TC.to(_wide(hidden_TH))


def _store_carefully(
    block: tuple[Tensor, Tensor, Tensor, float], few_R: Tensor, saved: _Saved, rows_R: Tensor
) -> None:
    """The results of a few rows from all their logits at once, relative to the maximum."""
    hidden_TH, weight_VH, targets_T, inverse_temperature = block
    wide = _wide(hidden_TH)
    hidden_RH, known_R = hidden_TH[few_R], targets_T[few_R].clamp(min=0)
    logits_RV = (hidden_RH @ weight_VH.T).to(wide).mul_(inverse_temperature)
    lse_R = logits_RV.logsumexp(dim=1)
    logp_RV = logits_RV - lse_R[:, None]
    saved.lse_T[rows_R] = lse_R
    saved.logp_T[rows_R] = logp_RV.gather(1, known_R[:, None])[:, 0]
    p_RV = logp_RV.exp()
    entropy_R = -torch.xlogy(p_RV, p_RV).sum(dim=1)
    saved.entropy_T[rows_R] = entropy_R
    if len(saved.logp_pull_TH):
        mean_RH = (p_RV.to(weight_VH.dtype) @ weight_VH).to(wide)
        own_RH = weight_VH[known_R].to(wide)
        saved.logp_pull_TH[rows_R] = (own_RH - mean_RH) * inverse_temperature
    if len(saved.entropy_pull_TH):
        slope_RV = torch.xlogy(p_RV, p_RV).add_(p_RV * entropy_R[:, None]).neg_()
        pull_RH = (slope_RV.to(weight_VH.dtype) @ weight_VH).to(wide)
        saved.entropy_pull_TH[rows_R] = pull_RH * inverse_temperature


def _weight_gradient(
    operands: tuple[Tensor, Tensor, Tensor],
    saved: _Saved,
    grad_logp_T: Tensor,
    grad_entropy_T: Tensor | None,
    inverse_temperature: float,
) -> Tensor:
    """dL/dW [V, H], a slice of the vocabulary at a time."""
    hidden_TH, weight_VH, targets_T = operands
    grad_VH = torch.empty_like(weight_VH)
    shift_T = (saved.lse_T * _LOG2E).to(hidden_TH.dtype)
    rest_T = (shift_T.to(saved.lse_T.dtype) - saved.lse_T * _LOG2E)[:, None]
    for start in range(0, len(weight_VH), _CPU_COLUMNS):
        weight_CH = weight_VH[start : start + _CPU_COLUMNS]
        x_TC = _exponents(hidden_TH, weight_CH, shift_T, inverse_temperature).add_(rest_T)
        p_TC = torch.exp2(x_TC)
        grad_TC = p_TC * -grad_logp_T[:, None]
        if grad_entropy_T is not None:
            slope_TC = x_TC.mul_(_LN2).add_(saved.entropy_T[:, None]).mul_(p_TC)
            grad_TC.sub_(slope_TC.mul_(grad_entropy_T[:, None]))
        rows_T = ((targets_T >= start) & (targets_T < start + len(weight_CH))).nonzero()[:, 0]
        grad_TC[rows_T, targets_T[rows_T] - start] += grad_logp_T[rows_T]
        grad_TC.mul_(inverse_temperature)
        grad_VH[start : start + len(weight_CH)] = grad_TC.to(hidden_TH.dtype).T @ hidden_TH
    return grad_VH


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

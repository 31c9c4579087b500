"""Log-prob of given tokens, and entropy, straight from hidden states: no [T, V] tensor exists.

    x_tv   = h_t . w_v / temperature                       [T, V], never stored
    lse_t  = log sum_v exp(x_tv)                           p_tv = exp(x_tv - lse_t)
    logp_t = x_t,y(t) - lse_t                              H_t  = lse_t - sum_v p_tv x_tv
    dL/dx_tv = dlogp_t ([v = y(t)] - p_tv) - dH_t p_tv (log p_tv + H_t)

with h [T, H] (hidden states after the final norm), w [V, H] (the head), y int64 [T]. A negative
target asks for nothing: its log-prob is 0 and it moves no gradient, other than by its entropy.

On a GPU a Triton kernel walks over tiles of x with a running maximum and sum, and backward
rebuilds a slice of columns of dL/dx at a time for two matrix products of the library. On a CPU
`token_logprob_tiles.py` does it with torch operators. Sums are fp32 in both.

Pure functions, any thread. `token_logprobs_reference` is the textbook form, for tests.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    INTERPRETED,
    cdiv,
    dot_dtype,
    jit,
    next_power_of_2,
    num_multiprocessors,
    refuse_unless,
    runs_triton,
    tl,
)
from heedful_kernels.token_logprob_tiles import Tiled

_NAME: Final = "token_logprob"
# Columns of dL/dx that exist at a time on a GPU.
_SLICE_BYTES: Final = 256 << 20


def token_logprobs(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the targets, fp32 [T]; differentiable in hidden states and weight.

    Args:
        hidden_TH: bf16, fp16 or fp32 (fp64 by the reference).
        weight_VH: the same dtype.
        targets_T: int64 below V; negative ones give 0.
        temperature: logits are divided by it; above 0.

    Raises:
        RefusedInputError: shapes, dtypes or devices do not go together.
    """
    return _compute(hidden_TH, weight_VH, targets_T, temperature, entropy=False)[0]


def token_logprobs_and_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and the entropy in nats of the whole distribution, each fp32 [T].

    Both are differentiable; arguments and errors as token_logprobs.
    """
    return _compute(hidden_TH, weight_VH, targets_T, temperature, entropy=True)


def token_logprobs_reference(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The textbook form, which stores the logits: log-probs and entropies."""
    logits_TV = hidden_TH @ weight_VH.T
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    logp_TV = torch.log_softmax(logits_TV.to(wide) / temperature, dim=-1)
    logp_T = logp_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    return logp_T.masked_fill(targets_T < 0, 0.0), -(logp_TV.exp() * logp_TV).sum(dim=-1)


def _compute(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    _check(hidden_TH, weight_VH, targets_T, temperature)
    unsupported = "" if hidden_TH.dtype in FLOATS else f"dtype_{hidden_TH.dtype}"
    if runs_triton(_NAME, hidden_TH, unsupported):
        logp_T, entropy_T, _ = _forward_op(
            hidden_TH, weight_VH, targets_T, 1.0 / temperature, entropy
        )
        return logp_T, entropy_T
    wants_grad = torch.is_grad_enabled() and hidden_TH.requires_grad
    # Inside forward gradients are always off; what the caller wants is known only here.
    outputs: tuple[Tensor, Tensor] = Tiled.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_VH, targets_T, 1.0 / temperature, entropy, wants_grad
    )
    return outputs


def _check(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature: float) -> None:
    refuse_unless(hidden_TH.dim() == 2, _NAME, f"hidden must be [T, H], not {hidden_TH.shape}")
    refuse_unless(
        weight_VH.dim() == 2 and weight_VH.shape[1] == hidden_TH.shape[1] and len(weight_VH) > 0,
        _NAME,
        f"weight must be [V, {hidden_TH.shape[1]}], not {tuple(weight_VH.shape)}",
    )
    refuse_unless(
        targets_T.shape == hidden_TH.shape[:1] and targets_T.dtype == torch.int64,
        _NAME,
        f"targets must be int64 [T], not {targets_T.dtype} {tuple(targets_T.shape)}",
    )
    refuse_unless(
        hidden_TH.dtype == weight_VH.dtype,
        _NAME,
        f"hidden is {hidden_TH.dtype} and weight {weight_VH.dtype}",
    )
    refuse_unless(
        hidden_TH.device == weight_VH.device == targets_T.device, _NAME, "tensors on two devices"
    )
    refuse_unless(
        math.isfinite(temperature) and temperature > 0.0, _NAME, f"temperature {temperature}"
    )


# The GPU way: one kernel over tiles, in parts of the vocabulary; partial results are joined after.


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, targets, parts, own_out,
    num_tokens, num_words, scale,
    hidden_stride, weight_stride, words_per_part,
    H: tl.constexpr, DOT: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < num_tokens
    y = tl.load(targets + t, mask=t_ok, other=-1)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    d = tl.zeros([BLOCK_T], tl.float32)
    own = tl.zeros([BLOCK_T], tl.float32)
    first = part * words_per_part
    last = tl.minimum(first + words_per_part, num_words)
    for v0 in range(first, last, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        v_ok = v < last
        x = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            a = tl.load(hidden + t[:, None] * hidden_stride + h[None, :],
                        mask=t_ok[:, None] & (h[None, :] < H), other=0.0)  # fmt: skip
            b = tl.load(weight + v[None, :] * weight_stride + h[:, None],
                        mask=v_ok[None, :] & (h[:, None] < H), other=0.0)  # fmt: skip
            x = tl.dot(a.to(DOT), b.to(DOT), x, input_precision="ieee")
        x = x * scale
        own += tl.sum(tl.where((v[None, :] == y[:, None]) & v_ok[None, :], x, 0.0), 1)
        x = tl.where(v_ok[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        decay = tl.exp(m - m_new)
        p = tl.exp(x - m_new[:, None])
        s = s * decay + tl.sum(p, 1)
        if ENTROPY:
            d = d * decay + tl.sum(tl.where(v_ok[None, :], p * x, 0.0), 1)
        m = m_new
    # parts [3, P, T]: maximum, sum, dot.
    out = parts + part * num_tokens + t
    plane = tl.num_programs(1).to(tl.int64) * num_tokens
    tl.store(out, m, mask=t_ok)
    tl.store(out + plane, s, mask=t_ok)
    tl.store(out + 2 * plane, d, mask=t_ok)
    mine = t_ok & (y >= first) & (y < last)
    tl.store(own_out + t, own, mask=mine)


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, targets, lse, entropy, grad_logp, grad_entropy, grad_x,
    num_tokens, num_words, first_word, scale,
    hidden_stride, weight_stride, grad_stride,
    H: tl.constexpr, DOT: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    v = first_word + column
    t_ok, v_ok = t < num_tokens, v < num_words
    x = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        a = tl.load(hidden + t[:, None] * hidden_stride + h[None, :],
                    mask=t_ok[:, None] & (h[None, :] < H), other=0.0)  # fmt: skip
        b = tl.load(weight + v[None, :] * weight_stride + h[:, None],
                    mask=v_ok[None, :] & (h[:, None] < H), other=0.0)  # fmt: skip
        x = tl.dot(a.to(DOT), b.to(DOT), x, input_precision="ieee")
    y = tl.load(targets + t, mask=t_ok, other=-1)
    g = tl.load(grad_logp + t, mask=t_ok & (y >= 0), other=0.0)
    logp = x * scale - tl.load(lse + t, mask=t_ok, other=0.0)[:, None]
    p = tl.exp(logp)
    grad = g[:, None] * (tl.where(v[None, :] == y[:, None], 1.0, 0.0) - p)
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + t, mask=t_ok, other=0.0)
        total = tl.load(entropy + t, mask=t_ok, other=0.0)
        grad -= g_entropy[:, None] * p * (logp + total[:, None])
    out = grad_x + t[:, None] * grad_stride + column[None, :]
    tl.store(out, grad * scale, mask=t_ok[:, None] & v_ok[None, :])


def _tiles(dtype: torch.dtype) -> dict[str, Any]:
    if INTERPRETED:
        return {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 32}
    if dtype == torch.float32:
        return {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("heedful::token_logprob_forward", mutates_args=())
def _forward_op(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    inverse_temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies (zeros unless asked for) and log-sum-exps, fp32 [T]."""
    num_tokens, num_words = len(hidden_TH), len(weight_VH)
    hidden_TH, weight_VH = _rows(hidden_TH), _rows(weight_VH)
    own_T = torch.zeros(num_tokens, device=hidden_TH.device, dtype=torch.float32)
    if num_tokens == 0:
        return own_T, own_T.clone(), own_T.clone()
    tiles = _tiles(hidden_TH.dtype)
    blocks_T = cdiv(num_tokens, tiles["BLOCK_T"])
    num_parts = min(cdiv(2 * num_multiprocessors(hidden_TH.device), blocks_T), 64)
    words_per_part = cdiv(cdiv(num_words, num_parts), tiles["BLOCK_V"]) * tiles["BLOCK_V"]
    num_parts = cdiv(num_words, words_per_part)
    parts = torch.empty(3, num_parts, num_tokens, device=hidden_TH.device, dtype=torch.float32)
    _forward_kernel[(blocks_T, num_parts)](
        hidden_TH, weight_VH, targets_T, parts, own_T,
        num_tokens, num_words, inverse_temperature,
        hidden_TH.stride(0), weight_VH.stride(0), words_per_part,
        H=hidden_TH.shape[1], DOT=dot_dtype(hidden_TH.dtype), ENTROPY=entropy, **tiles, **COMPILE,
    )  # fmt: skip
    max_PT, sum_PT, dot_PT = parts.unbind()
    max_T = max_PT.amax(dim=0)
    decay_PT = (max_PT - max_T).exp()
    sum_T = (sum_PT * decay_PT).sum(dim=0)
    lse_T = max_T + sum_T.log()
    logp_T = (own_T - lse_T).clamp(max=0.0).masked_fill(targets_T < 0, 0.0)
    if not entropy:
        return logp_T, torch.zeros_like(lse_T), lse_T
    return logp_T, lse_T - (dot_PT * decay_PT).sum(dim=0) / sum_T, lse_T


@_forward_op.register_fake
def _(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    inverse_temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    one = hidden_TH.new_empty(hidden_TH.shape[:1], dtype=torch.float32)
    return one, torch.empty_like(one), torch.empty_like(one)


@torch.library.custom_op("heedful::token_logprob_backward", mutates_args=())
def _backward_op(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    entropy_T: Tensor,
    grad_logp_T: Tensor,
    grad_entropy_T: Tensor,
    inverse_temperature: float,
    entropy: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dL/dhidden [T, H] and, where wanted, dL/dweight [V, H] (else empty)."""
    num_tokens, num_words = len(hidden_TH), len(weight_VH)
    hidden_TH, weight_VH = _rows(hidden_TH), _rows(weight_VH)
    grad_TH = torch.zeros(hidden_TH.shape, device=hidden_TH.device, dtype=torch.float32)
    grad_VH = torch.zeros_like(weight_VH if wants_weight else weight_VH[:0])
    if num_tokens == 0:
        return grad_TH.to(hidden_TH.dtype), grad_VH
    tiles = _tiles(hidden_TH.dtype)
    columns = next_power_of_2(_SLICE_BYTES // (num_tokens * hidden_TH.element_size()))
    columns = max(tiles["BLOCK_V"], min(columns, next_power_of_2(num_words)))
    grad_TC = hidden_TH.new_empty(num_tokens, columns)
    for first in range(0, num_words, columns):
        width = min(columns, num_words - first)
        _gradient_kernel[(cdiv(num_tokens, tiles["BLOCK_T"]), cdiv(width, tiles["BLOCK_V"]))](
            hidden_TH, weight_VH, targets_T, lse_T, entropy_T,
            grad_logp_T.contiguous(), grad_entropy_T.contiguous(), grad_TC,
            num_tokens, num_words, first, inverse_temperature,
            hidden_TH.stride(0), weight_VH.stride(0), columns,
            H=hidden_TH.shape[1], DOT=dot_dtype(hidden_TH.dtype), ENTROPY=entropy,
            **tiles, **COMPILE,
        )  # fmt: skip
        grad_TH += grad_TC[:, :width] @ weight_VH[first : first + width]
        if wants_weight:
            torch.mm(grad_TC[:, :width].T, hidden_TH, out=grad_VH[first : first + width])
    return grad_TH.to(hidden_TH.dtype), grad_VH


@_backward_op.register_fake
def _(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    entropy_T: Tensor,
    grad_logp_T: Tensor,
    grad_entropy_T: Tensor,
    inverse_temperature: float,
    entropy: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_TH), torch.empty_like(
        weight_VH if wants_weight else weight_VH[:0]
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TH, weight_VH, targets_T, inverse_temperature, entropy = inputs
    _, entropy_T, lse_T = output
    ctx.save_for_backward(hidden_TH, weight_VH, targets_T, lse_T, entropy_T)
    ctx.inverse_temperature, ctx.entropy = inverse_temperature, entropy


def _backward(
    ctx: Any, grad_logp_T: Tensor, grad_entropy_T: Tensor, grad_lse_T: Tensor
) -> tuple[Tensor | None, ...]:
    # The log-sum-exp is an intermediate result that no public function returns.
    hidden_TH, weight_VH, targets_T, lse_T, entropy_T = ctx.saved_tensors
    wants_weight = ctx.needs_input_grad[1]
    grad_hidden, grad_weight = _backward_op(
        hidden_TH, weight_VH, targets_T, lse_T, entropy_T, grad_logp_T, grad_entropy_T,
        ctx.inverse_temperature, ctx.entropy, wants_weight,
    )  # fmt: skip
    return grad_hidden, grad_weight if wants_weight else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)

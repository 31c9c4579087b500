"""`token_logprob` forward and backward at H = 4096, V = 128k, beside Liger and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from heedful_kernels.token_logprob import token_logprobs

from gpu_rows.common import Row, eager_seconds, in_units

TOKENS, HIDDEN, VOCAB = 2048, 4096, 131_072


def rows() -> Iterator[Row]:
    """TFLOP/s of the forward pass, and of both passes."""
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.1
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
    flops = 2.0 * TOKENS * HIDDEN * VOCAB
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = eager_seconds(lambda: token_logprobs(hidden, weight, targets))
        extra = torch.cuda.max_memory_allocated() - before
        peers = {
            "Liger": _or_reason(lambda: eager_seconds(_liger(hidden, weight, targets))),
            "torch": _or_reason(lambda: eager_seconds(lambda: _plain(hidden, weight, targets))),
        }
    yield Row(
        "token_logprob, forward",
        f"T = {TOKENS}, H = {HIDDEN}, V = {VOCAB}, bf16",
        "TFLOP/s",
        figure=flops / seconds / 1e12,
        peers={key: _rate(value, flops) for key, value in peers.items()},
        target="≥ 80 % of Liger; no [T, V] tensor",
        rises=True,
        note=f"{extra / 1e6:.0f} MB beside inputs; a [T, V] tensor in fp32 has "
        f"{TOKENS * VOCAB * 4 / 1e6:.0f} MB; Liger's forward also computes gradients",
    )
    wide = hidden.clone().requires_grad_()

    def both() -> None:
        (grad,) = torch.autograd.grad(token_logprobs(wide, weight, targets).sum(), wide)
        assert grad.shape == wide.shape

    yield Row(
        "token_logprob, forward and backward in hidden",
        f"T = {TOKENS}, H = {HIDDEN}, V = {VOCAB}, bf16",
        "ms",
        figure=eager_seconds(both) * 1e3,
    )


def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])


def _liger(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> Callable[[], object]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(weight, hidden, targets)


def _or_reason(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except ImportError as error:
        return f"absent ({error.name or error})"
    except Exception as error:
        return f"failed ({type(error).__name__})"


def _rate(seconds: float | str, flops: float) -> float | str:
    return seconds if isinstance(seconds, str) else in_units(flops / seconds, 1e-12)

import math
from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.token_logprob import (
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_reference,
)
from torch import Tensor

# Every test runs on torch operators in the plain process and on the Triton kernel in the other.
both_ways = pytest.mark.parametrize(
    "way", ["torch", pytest.param("triton", marks=pytest.mark.triton)]
)


def operands(
    tokens: int, hidden: int, words: int, device: torch.device, *, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 7919 + words)
    hidden_TH = torch.randn(tokens, hidden, generator=generator) * spread
    weight_VH = torch.randn(words, hidden, generator=generator)
    targets_T = torch.randint(0, words, (tokens,), generator=generator)
    return hidden_TH.to(device), weight_VH.to(device), targets_T.to(device)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and the gradients of random sums of them."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(hidden, weight, targets, temperature=0.7)
    generator = torch.Generator().manual_seed(5)
    pulls = [torch.randn(len(hidden), generator=generator).to(logp) for _ in range(2)]
    loss = (logp * pulls[0]).sum() + (entropy * pulls[1]).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


@both_ways
@pytest.mark.parametrize(("tokens", "hidden", "words"), [(1, 3, 1), (5, 40, 67), (18, 33, 100)])
def test_values_and_gradients_are_the_textbook_s(
    tokens: int, hidden: int, words: int, device: torch.device, way: str
) -> None:
    h, w, y = operands(tokens, hidden, words, device)
    y[tokens // 2] = -1
    ours = gradients(token_logprobs_and_entropy, h, w, y)
    exact = gradients(token_logprobs_reference, h.double(), w.double(), y)
    # Logits are sums of `hidden` products of size about one, divided by 0.7; a result adds up some
    # hundreds of them. Each rounds at 2^-24.
    for mine, theirs in zip(ours, exact, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert (mine.double() - theirs).abs().max() < 2**-24 * 40 * math.sqrt(hidden) * scale


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_lose_no_more_than_rounding_the_logits(
    dtype: torch.dtype, device: torch.device, way: str
) -> None:
    h, w, y = (part.to(dtype) if part.is_floating_point() else part for part in
               operands(24, 48, 90, device, spread=0.7))  # fmt: skip
    logp, entropy = token_logprobs_and_entropy(h, w, y)
    exact = token_logprobs_reference(h.double(), w.double(), y)
    logit_size = float((h.double() @ w.double().T).abs().max())
    assert (logp - exact[0]).abs().max() < torch.finfo(dtype).eps * logit_size
    assert (entropy - exact[1]).abs().max() < 2 * torch.finfo(dtype).eps * logit_size


def test_in_bf16_the_tiles_are_nearer_to_the_truth_than_rounded_logits(
    device: torch.device,
) -> None:
    h, w, _ = operands(200, 64, 300, device, spread=2.0)
    h, w = h.bfloat16(), w.bfloat16()
    y = (h @ w.T).float().softmax(-1).multinomial(1)[:, 0]
    exact = token_logprobs_reference(h.double(), w.double(), y)[0]
    ours = (token_logprobs(h, w, y) - exact).abs().mean()
    usual = (token_logprobs_reference(h, w, y)[0] - exact).abs().mean()
    assert ours < 0.6 * usual


@both_ways
def test_tokens_far_below_the_best_and_huge_logits(device: torch.device, way: str) -> None:
    h, w, y = operands(6, 16, 50, device, spread=60.0)
    y[:3] = (h @ w.T).argmin(dim=-1)[:3]
    y[3:] = (h @ w.T).argmax(dim=-1)[3:]
    ours = gradients(token_logprobs_and_entropy, h, w, y)
    exact = gradients(token_logprobs_reference, h.double(), w.double(), y)
    assert exact[0].min() < -300
    for mine, theirs in zip(ours, exact, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert (mine.double() - theirs).abs().max() < 1e-4 * scale


@both_ways
def test_entropy_alone_and_frozen_weights(device: torch.device, way: str) -> None:
    h, w, y = operands(7, 20, 30, device)
    y[:] = -1
    hidden = h.clone().requires_grad_()
    logp, entropy = token_logprobs_and_entropy(hidden, w, y)
    (logp.sum() + entropy.sum()).backward()
    reference = h.double().requires_grad_()
    token_logprobs_reference(reference, w.double(), y)[1].sum().backward()
    assert torch.equal(logp, torch.zeros_like(logp))
    assert hidden.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(hidden.grad.double(), reference.grad, atol=3e-5, rtol=0)


@both_ways
def test_nothing_to_do_and_strange_strides(device: torch.device, way: str) -> None:
    h, w, y = operands(9, 24, 40, device)
    # Quarters: every logit is exact, in whatever order a layout's matmul sums it.
    h, w = (h * 4).round() / 4, (w * 4).round() / 4
    assert token_logprobs(h[:0], w, y[:0]).shape == (0,)
    empty = h[:0].clone().requires_grad_()
    token_logprobs(empty, w, y[:0]).sum().backward()
    assert empty.grad is not None
    wide = torch.stack((h, h), dim=-1)[:, :, 0]
    columns = w.T.contiguous().T
    assert not wide.is_contiguous()
    expected = token_logprobs(h, w, y)
    torch.testing.assert_close(token_logprobs(wide, columns, y), expected, atol=1e-6, rtol=0)


@both_ways
def test_many_tiles_join_exactly(device: torch.device, way: str) -> None:
    rows = 1100 if way == "torch" else 20
    h, w, y = operands(rows, 4, 4500 if way == "torch" else 400, device)
    exact = token_logprobs_reference(h.double(), w.double(), y)
    ours = token_logprobs_and_entropy(h, w, y)
    assert (ours[0] - exact[0]).abs().max() < 1e-5
    assert (ours[1] - exact[1]).abs().max() < 1e-5


def test_fp64_passes_gradcheck() -> None:
    h, w, y = operands(3, 5, 9, torch.device("cpu"))
    inputs = (h.double().requires_grad_(), w.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: token_logprobs_and_entropy(a, b, y), inputs)


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    h, w, y = operands(4, 8, 12, device)
    operator = torch.ops.heedful.token_logprob_forward.default
    torch.library.opcheck(
        operator,
        (h.requires_grad_(), w, y, 1.0, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h[None], w, y), "hidden must be"),
        (lambda h, w, y: (h, w[:, 1:], y), "weight must be"),
        (lambda h, w, y: (h, w, y.int()), "targets must be int64"),
        (lambda h, w, y: (h.bfloat16(), w, y), "hidden is"),
    ],
)
def test_misfits_are_refused_by_name(
    change: Callable[..., tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(RefusedInputError, match=message):
        token_logprobs(*change(*operands(4, 8, 12, torch.device("cpu"))))

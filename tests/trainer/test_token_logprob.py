"""The chunked head: equal to the plain formula in value and gradient, over several chunks."""

import pytest
import torch
from heedful_trainer.token_logprob import CHUNK_ROWS, token_kl, token_logprobs


@pytest.mark.parametrize("rows", [0, 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
def test_equal_to_the_plain_formula(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64)
    tokens = torch.randint(0, 13, (rows,))
    got = token_logprobs(hidden, weight, tokens)
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, plain)
    upstream = torch.randn(rows, dtype=torch.float64)
    (mine,) = torch.autograd.grad((got * upstream).sum(), hidden)
    (other,) = torch.autograd.grad((plain * upstream).sum(), hidden)
    torch.testing.assert_close(mine, other)


def test_bfloat16_keeps_its_sums_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    got = token_logprobs(hidden, weight, torch.arange(9))
    assert got.dtype == torch.float32
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(9), torch.arange(9)]
    # Logits of size 20 have 8 bits: half a step of 2^-4 either way.
    torch.testing.assert_close(got.double(), exact, atol=0.13, rtol=0)


def test_divergence_is_that_of_the_whole_distribution() -> None:
    torch.manual_seed(0)
    p, q, weight = torch.randn(5, 4), torch.randn(5, 4), torch.randn(7, 4)
    log_p, log_q = (p @ weight.T).log_softmax(-1), (q @ weight.T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_kl(p, q, weight), expected)
    assert token_kl(p, p, weight).abs().max() < 1e-6

"""PPO's losses: at ratio 1 the policy gradient, no gradient for masked tokens, clips by hand."""

import math

import pytest
import torch
from heedful_trainer import ppo_losses
from torch import Tensor


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), at)
    return found


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    losses = ppo_losses.policy_losses(logprobs, logprobs.detach(), advantages, clip=0.2)
    got = gradient(losses, logits)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, gradient(-advantages * logprobs, logits))


def test_the_clip_by_hand() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 1.0], dtype=torch.float64)
    old = torch.zeros(5, dtype=torch.float64)
    losses = ppo_losses.policy_losses(logprobs, old, advantages, clip=0.2)
    assert losses.tolist() == pytest.approx([-2.4, -1.0, 3.0, 1.6, -1.1])
    # Beyond the clip in the direction of the advantage there is no gradient; back there is.
    assert gradient(losses, logprobs).tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0, -1.1])
    share = ppo_losses.clipped_share(logprobs.detach(), old, advantages, clip=0.2)
    assert float(share) == pytest.approx(2 / 5)


def test_masked_tokens_have_no_gradient_whatever_they_hold() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -torch.inf], requires_grad=True)
    old = torch.tensor([-1.0, -2.0, -3.0])
    weights = torch.tensor([1.0, 0.0, 0.0])
    losses = ppo_losses.policy_losses(
        logprobs, old, torch.tensor([2.0, 5.0, 5.0]), clip=0.2, weights=weights
    )
    assert losses.tolist() == [-2.0, 0.0, 0.0]
    assert gradient(losses, logprobs).tolist() == [-2.0, 0.0, 0.0]


def test_weights_are_the_truncated_ratio_to_what_sampled() -> None:
    old = torch.tensor([math.log(0.5), math.log(0.6), math.log(0.1)], requires_grad=True)
    behaviour = torch.tensor([math.log(0.5), math.log(0.2), math.log(0.2)])
    weights = ppo_losses.behaviour_weights(old, behaviour)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert not weights.requires_grad


def test_weighted_losses_correct_for_the_sampler() -> None:
    """E_μ[w · loss] is E_π_old[loss] where no weight is truncated."""
    behaviour = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    old = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    policy, advantages = old.log() + 0.05, torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)
    weights = ppo_losses.behaviour_weights(old.log(), behaviour.log())
    plain = ppo_losses.policy_losses(policy, old.log(), advantages, clip=0.2)
    weighted = ppo_losses.policy_losses(policy, old.log(), advantages, clip=0.2, weights=weights)
    assert float((behaviour * weighted).sum()) == pytest.approx(float((old * plain).sum()))


def test_values_are_clipped_around_where_they_were() -> None:
    values = torch.tensor([2.0, 0.1, -1.0], requires_grad=True)
    old = torch.zeros(3)
    returns = torch.tensor([1.0, 1.0, 1.0])
    losses = ppo_losses.value_losses(values, old, returns, clip=0.5)
    # clipped to .5, .1, −.5: errors (1, .25), (.81, .81), (4, 2.25)
    assert losses.tolist() == pytest.approx([0.5, 0.405, 2.0])
    plain = ppo_losses.value_losses(values, old, returns, clip=None)
    assert gradient(plain, values).tolist() == pytest.approx([1.0, -0.9, -2.0])

"""The reward losses: values worked by hand, a brute force over pairs, and TRL's pair loss."""

import itertools
import math

import pytest
import torch
from heedful_trainer import reward_losses as rl


def test_davidson_probabilities_by_hand() -> None:
    # p_i = 4, p_j = 1, so that their root is 2; with ν = 1: 4/7, 1/7, 2/7.
    got = rl.davidson_logprobs(torch.tensor(math.log(4.0)), torch.tensor(0.0)).exp()
    assert got.tolist() == pytest.approx([4 / 7, 1 / 7, 2 / 7])


def test_without_ties_it_is_bradley_terry() -> None:
    got = rl.davidson_logprobs(torch.tensor([1.5]), None)[0]
    assert got[0].exp().item() == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert got[2].item() == -math.inf


@pytest.mark.parametrize("log_nu", [None, -0.7])
def test_a_ranking_is_the_mean_over_all_its_pairs(log_nu: float | None) -> None:
    torch.manual_seed(0)
    rewards = torch.randn(5, dtype=torch.float64)
    ranks = torch.tensor([1, 0, 1, 3, 2])
    nu = None if log_nu is None else torch.tensor(log_nu, dtype=torch.float64)
    expected = []
    for i, j in itertools.combinations(range(5), 2):
        p_i, p_j = math.exp(rewards[i]), math.exp(rewards[j])
        tie = math.exp(log_nu) * math.sqrt(p_i * p_j) if log_nu is not None else 0.0
        total = p_i + p_j + tie
        if ranks[i] < ranks[j]:
            expected.append(-math.log(p_i / total))
        elif ranks[j] < ranks[i]:
            expected.append(-math.log(p_j / total))
        elif log_nu is None:
            expected.append(-(math.log(p_i / total) + math.log(p_j / total)) / 2)
        else:
            expected.append(-math.log(tie / total))
    assert rl.ranking_loss(rewards, ranks, nu).item() == pytest.approx(sum(expected) / 10)


def test_each_head_has_its_own_loss() -> None:
    rewards = torch.randn(4, 3, dtype=torch.float64)
    ranks = torch.tensor([0, 1, 1, 2])
    nu = torch.tensor(0.1, dtype=torch.float64)
    together = rl.ranking_loss(rewards, ranks, nu)
    alone = [rl.ranking_loss(rewards[:, head], ranks, nu).item() for head in range(3)]
    assert together.tolist() == pytest.approx(alone)


def test_a_pair_equals_the_loss_of_trl() -> None:
    from torch.nn.functional import logsigmoid

    torch.manual_seed(1)
    rewards = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    # RewardTrainer.compute_loss: -logsigmoid(rewards_chosen - rewards_rejected).mean()
    theirs = -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    ranks = torch.tensor([0, 1])
    mine = torch.stack([rl.ranking_loss(row, ranks) for row in rewards]).mean()
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-12)
    (a,) = torch.autograd.grad(mine, rewards, retain_graph=True)
    (b,) = torch.autograd.grad(theirs, rewards)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_the_first_nu_makes_equal_answers_tie_as_often_as_seen() -> None:
    log_nu = rl.initial_log_nu(3, 10)
    assert log_nu is not None
    tie = rl.davidson_logprobs(torch.tensor(0.0), torch.tensor(log_nu))[2].exp()
    assert tie.item() == pytest.approx(0.3)
    assert rl.initial_log_nu(0, 10) is None
    assert rl.initial_log_nu(10, 10) == pytest.approx(math.log(18))


def test_thumbs_are_centred_where_siblings_disagree() -> None:
    rewards = torch.tensor([2.0, 0.0, 5.0, 5.0])
    up = torch.tensor([True, False, True, True])
    loss = rl.thumb_loss(rewards, up, torch.tensor([0, 0, 1, 1]), torch.tensor(4.0))
    half = math.log(1 + math.exp(-1))
    assert loss.tolist() == pytest.approx([half] * 4)


def test_a_level_common_to_all_siblings_is_not_learned() -> None:
    up, prompt = torch.tensor([True, False]), torch.tensor([0, 0])
    base = torch.tensor([1.0, 0.5])
    first = rl.thumb_loss(base, up, prompt, torch.tensor(0.0))
    raised = rl.thumb_loss(base + 9, up, prompt, torch.tensor(0.0))
    torch.testing.assert_close(first, raised)


def test_all_bad_is_a_thumb_down_for_each() -> None:
    rewards = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    loss = rl.all_bad_loss(rewards, torch.tensor(0.0))
    (grad,) = torch.autograd.grad(loss, rewards)
    assert grad.tolist() == pytest.approx([torch.sigmoid(r).item() / 3 for r in rewards.detach()])


def test_a_larger_rewrite_asks_for_a_larger_margin() -> None:
    zero = torch.tensor(0.0)
    assert rl.correction_loss(zero, zero, 0.0).item() == pytest.approx(math.log(2))
    assert rl.correction_loss(zero, zero, 1.0).item() == pytest.approx(math.log(1 + math.e))
    with pytest.raises(ValueError, match="edit_distance"):
        rl.correction_loss(zero, zero, 1.5)


def test_the_shift_makes_demonstrations_mean_zero() -> None:
    rewards = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    assert (rewards - rl.mean_zero_shift(rewards)).mean(0).tolist() == [0.0, 0.0]

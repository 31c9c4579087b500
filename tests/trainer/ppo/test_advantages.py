"""Token rewards, GAE, whitening, guards and the KL controller, against numbers worked by hand."""

import math

import pytest
import torch
from heedful_trainer import advantages
from heedful_trainer.advantages import KlController

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_the_kl_is_paid_by_each_token_and_the_reward_comes_at_the_last() -> None:
    kl = torch.tensor([[1.0, -2.0, 4.0], [3.0, torch.nan, torch.inf]])
    got = advantages.token_rewards(kl, torch.tensor([10.0, -1.0]), MASK, beta=0.5)
    assert got.tolist() == [[-0.5, 1.0, 8.0], [-2.5, 0.0, 0.0]]


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, -1.0], [1.0, 7.0, torch.nan]])
    got, returns = advantages.generalised_advantages(rewards, values, MASK, lam=0.5)
    # δ = (1 + 1 − .5, 0 − 1 − 1, 2 + 0 + 1) = (1.5, −2, 3); A = (1.5 − .25, −2 + 1.5, 3)
    assert got.tolist() == [[1.25, -0.5, 3.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.75, 0.5, 2.0], [3.0, 0.0, 0.0]]


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_lambda_one_is_the_return_less_the_value_and_zero_the_one_step_error(
    discount: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 7])[:, None]
    whole, _ = advantages.generalised_advantages(rewards, values, mask, lam=1.0, discount=discount)
    one, _ = advantages.generalised_advantages(rewards, values, mask, lam=0.0, discount=discount)
    for b in range(5):
        for t in range(int(mask[b].sum())):
            end = int(mask[b].sum())
            later = sum(discount ** (s - t) * float(rewards[b, s]) for s in range(t, end))
            assert float(whole[b, t]) == pytest.approx(later - float(values[b, t]))
            following = float(values[b, t + 1]) if t + 1 < end else 0.0
            error = float(rewards[b, t]) + discount * following - float(values[b, t])
            assert float(one[b, t]) == pytest.approx(error)
    assert not whole[~mask].any()


def test_whitening_with_and_without_the_mean() -> None:
    values = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    spread = math.sqrt(8 / 3)
    shifted = advantages.whiten(values)
    assert shifted.tolist() == pytest.approx([-2 / spread, 0.0, 2 / spread])
    kept = advantages.whiten(values, shift_mean=False)
    assert kept.tolist() == pytest.approx([3 - 2 / spread, 3.0, 3 + 2 / spread])


def test_whitening_of_what_has_no_scale_stays_finite() -> None:
    assert advantages.whiten(torch.tensor([4.0])).tolist() == [0.0]
    assert advantages.whiten(torch.full((3,), 2.0)).tolist() == [0.0, 0.0, 0.0]


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0])
    assert advantages.kl_k1(policy, reference).tolist() == [1.0, -2.0]
    k3 = advantages.kl_k3(policy, reference)
    assert k3.tolist() == pytest.approx([math.exp(-1), math.exp(2) - 3])


def test_both_estimators_have_the_divergence_as_their_mean_and_k3_is_never_negative() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    k1, k3 = advantages.kl_k1(p.log(), q.log()), advantages.kl_k3(p.log(), q.log())
    assert float((p * k1).sum()) == pytest.approx(exact)
    assert float((p * k3).sum()) == pytest.approx(exact)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


def test_answers_that_never_end_or_grow_long_cost_something() -> None:
    got = advantages.guarded_rewards(
        torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.tensor([10, 10, round(30 * math.e)]),
        missing_end_penalty=2.0,
        usual_length=20.0,
        length_tolerance=1.5,
        length_penalty=0.5,
    )
    assert got.tolist()[:2] == [1.0, -1.0]
    assert got.tolist()[2] == pytest.approx(0.5, abs=0.01)


def test_the_controller_moves_by_a_fiftieth_at_most_and_rests_at_its_target() -> None:
    controller = KlController(0.1, target_nats=5.0)
    assert controller.updated(50.0).beta == pytest.approx(0.1 * 1.02)
    assert controller.updated(0.0).beta == pytest.approx(0.1 * 0.98)
    assert controller.updated(5.5).beta == pytest.approx(0.1 * 1.01)
    assert controller.updated(5.0) == controller
    assert KlController(0.02).updated(100.0).beta == 0.02

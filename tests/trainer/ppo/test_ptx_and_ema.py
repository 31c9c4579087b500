"""One ptx step by hand, one accumulated step against two, and the average of weights."""

import math

import pytest
import torch
from heedful_trainer import ema, ptx
from heedful_trainer.ptx import PtxWeight
from torch import nn


def model() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.tensor([1.0, -2.0])), "b": nn.Parameter(torch.tensor([0.5]))}


def test_the_loss_is_a_mean_over_tokens_and_its_parts_add_up() -> None:
    logprobs = torch.tensor([-1.0, -3.0, -2.0, -6.0])
    assert ptx.ptx_loss(logprobs).item() == 3.0
    parts = ptx.ptx_loss(logprobs[:1], 4) + ptx.ptx_loss(logprobs[1:], 4)
    assert parts.item() == 3.0


def test_gradients_are_taken_once() -> None:
    parameters = model()
    (parameters["a"] * torch.tensor([3.0, 4.0])).sum().backward()
    taken = ptx.take_gradients(parameters)
    assert taken["a"].tolist() == [3.0, 4.0]
    assert taken["b"].tolist() == [0.0]
    assert ptx.global_norm(taken) == 5.0
    assert ptx.global_norm(ptx.take_gradients(parameters)) == 0.0


def test_the_coefficient_by_ratio_by_letter_and_at_its_bound() -> None:
    by_ratio = PtxWeight(ratio=0.5, gamma=0.0, largest=10.0)
    assert by_ratio.coefficient(4.0, 2.0) == 1.0
    assert by_ratio.coefficient(4.0, 1e-9) == 10.0
    assert by_ratio.coefficient(4.0, 0.0) == 0.0
    assert by_ratio.coefficient(math.nan, 1.0) == 0.0
    assert PtxWeight(ratio=None, gamma=27.8).coefficient(1.0, 100.0) == 27.8
    assert PtxWeight(None, 0.0).is_off
    assert PtxWeight(0.0, 27.8).is_off
    assert not by_ratio.is_off


def test_one_ptx_step_by_hand() -> None:
    """SGD on two logits: PPO pushes token 0 with A = 1, ptx reads token 1; both start at ½."""
    logits = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameters = {"logits": logits}
    (-logits.log_softmax(0)[0]).backward()  # ratio 1, A = 1
    ppo = ptx.take_gradients(parameters)
    ptx.ptx_loss(logits.log_softmax(0)[1:]).backward()
    text = ptx.take_gradients(parameters)
    assert ppo["logits"].tolist() == [-0.5, 0.5]
    assert text["logits"].tolist() == [0.5, -0.5]
    ptx.accumulate(parameters, ppo, text, PtxWeight(None, 3.0).coefficient(1.0, 1.0))
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    # 0 − 0.1 (−.5 + 3 · .5) = −.1
    assert logits.tolist() == pytest.approx([-0.1, 0.1])


def test_two_adam_steps_are_not_the_paper_s_one() -> None:
    gradients = torch.tensor([1.0, 0.2]), torch.tensor([0.1, -1.0])

    def trained(accumulated: bool, gamma: float) -> list[float]:
        weight = nn.Parameter(torch.zeros(2))
        optimiser = torch.optim.Adam([weight], lr=0.1)
        for _ in range(5):
            ppo, text = gradients
            if accumulated:
                ptx.accumulate({"w": weight}, {"w": ppo}, {"w": text}, gamma)
                optimiser.step()
            else:
                for gradient in (ppo, gamma * text):
                    weight.grad = gradient.clone()
                    optimiser.step()
        return weight.tolist()

    once, twice = trained(True, 27.8), trained(False, 27.8)
    assert once != pytest.approx(twice, rel=0.1)
    # Accumulated, γ decides where the step goes; in two steps hardly: DeepSpeed-Chat's mistake.
    assert trained(True, 0.1)[1] * once[1] < 0
    assert trained(False, 2.0)[1] == pytest.approx(trained(False, 200.0)[1], rel=0.2)


def test_the_average_is_of_what_was_visited() -> None:
    average = ema.Ema(0.5)
    average.update({"w": torch.tensor([8.0])})
    assert average.average()["w"].tolist() == [8.0]
    average.update({"w": torch.tensor([2.0])})
    # (.5 · .5 · 8 + .5 · 2) / (1 − .25)
    assert average.average()["w"].tolist() == [4.0]
    again = ema.Ema(0.5)
    again.restore(average.sums, average.num_updates)
    for each in (average, again):
        each.update({"w": torch.tensor([1.0])})
    assert average.average() == again.average()


def test_a_half_life_is_a_share_of_the_run() -> None:
    decay = ema.decay_for(0.1, 100)
    assert decay**10 == pytest.approx(0.5)
    assert ema.decay_for(0.1, 3) == 0.5

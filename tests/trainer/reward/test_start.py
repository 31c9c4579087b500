"""The convex start of a reward model's heads."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from heedful_trainer.backbone import Backbone
from heedful_trainer.config import RewardSettings
from heedful_trainer.dataset.builders import Correction, Group, Order, group_by_prompt
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.reward.start import Judgements, fit, judgements_of, start_heads
from torch import Tensor

SETTINGS = RewardSettings(thumb_weight=0.5, correction_weight=0.2)


def judgements(
    vector: Tensor, outcome: list[float], bar: float = 0.0, prompts: list[int] | None = None
) -> Judgements:
    size = len(outcome)
    return Judgements(
        vector.double(),
        torch.full((size,), bar, dtype=torch.float64),
        torch.tensor(outcome, dtype=torch.float64),
        torch.ones(size, dtype=torch.float64),
        torch.tensor(prompts if prompts is not None else list(range(size))),
    )


def test_without_a_penalty_the_odds_are_the_labels() -> None:
    judged = judgements(torch.ones(4, 1), [1, 1, 1, 0])
    heads_EH, bar_E = fit(judged, judged.weight_J[:, None], 1e-12)
    assert float(heads_EH) == pytest.approx(math.log(3), abs=1e-4)
    assert float(bar_E) == 0.0


def test_of_answers_that_are_alike_the_bar_takes_the_odds() -> None:
    judged = judgements(torch.zeros(4, 2), [1, 1, 1, 0], bar=1.0)
    heads_EH, bar_E = fit(judged, judged.weight_J[:, None], 1.0)
    assert torch.equal(heads_EH, torch.zeros(1, 2, dtype=torch.float64))
    assert float(bar_E) == pytest.approx(-math.log(3), abs=1e-4)


def test_heads_are_fitted_each_on_its_weights() -> None:
    judged = judgements(torch.ones(2, 1), [1, 0])
    weights_JE = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    heads_EH, _ = fit(judged, weights_JE, 1e-12)
    assert heads_EH[:, 0].tolist() == pytest.approx([math.log(3), 0.0], abs=1e-4)


def test_at_the_least_loss_the_penalty_balances_the_gradient() -> None:
    vector_JH = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    outcomes = [float(x) for x in vector_JH[:, 0] > 0.3]
    judged = judgements(vector_JH, outcomes)
    heads_EH, _ = fit(judged, judged.weight_J[:, None], 0.7)
    residual_J = torch.sigmoid(vector_JH @ heads_EH[0]) - judged.outcome_J
    gradient_H = vector_JH.T @ residual_J / 30 + 0.7 * heads_EH[0]
    assert gradient_H.abs().max() < 1e-5


def test_what_people_said_as_vectors() -> None:
    group = Group((1,), {(10,): 0, (11,): 1, (12,): 2})
    group.orders.append(Order((0, 1, 2), (0, 1, 1), "comparison"))
    group.all_bad.append((1, 2))
    group.thumbs += [(0, True), (2, False)]
    group.corrections.append(Correction(1, 2, 0.5))
    feature_KH = torch.tensor([[-2.0], [-1.0], [3.0]]).double()
    got = judgements_of([group], [feature_KH], SETTINGS)
    third, fourth = 1 / 3 / 4, 1 / 4
    assert got.vector_JH[:, 0].tolist() == [-1, -5, -4, -1, 3, -2.5, 2.5, -4]
    assert got.bar_J.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert got.outcome_J.tolist() == [1, 1, 0.5, 0, 0, 1, 0, 1]
    expected = [third, third, third, 0.5 * fourth, 0.5 * fourth]
    expected += [0.25 * fourth, 0.25 * fourth, 0.2 * fourth]
    assert got.weight_J.tolist() == pytest.approx(expected)
    dropped = judgements_of([group], [feature_KH], SETTINGS.model_copy(update={"drop_ties": True}))
    assert dropped.vector_JH[:, 0].tolist() == [-1, -5, -1, 3, -2.5, 2.5, -4]
    assert dropped.weight_J[:2].tolist() == pytest.approx([1 / 2 / 4] * 2)


def test_thumbs_that_agree_are_measured_by_the_bar() -> None:
    group = Group((1,), {(10,): 0, (11,): 1})
    group.thumbs += [(0, True), (1, True)]
    got = judgements_of([group], [torch.tensor([[-1.0], [1.0]]).double()], SETTINGS)
    assert got.vector_JH[:, 0].tolist() == [-1, 1]
    assert got.bar_J.tolist() == [1, 1]


def start(backbone: Backbone, examples: Any, seed: int) -> tuple[RewardModel, float, list[Group]]:
    backbone.adapter.reset(seed)
    groups = group_by_prompt(examples, "train")
    model = RewardModel(backbone, Heads(3, backbone.hidden_size))
    weights_GE = 0.5 + torch.rand(len(groups), 3, generator=torch.Generator().manual_seed(1))
    penalty, _ = start_heads(model, groups, SETTINGS, weights_GE, NoHooks())
    return model, penalty, groups


def test_heads_start_where_the_base_already_tells_answers_apart(
    backbone: Backbone, make_pairs: Any
) -> None:
    examples = make_pairs(150)
    model, penalty, _ = start(backbone, examples, 0)
    with torch.no_grad():
        for name, value in backbone.adapter.parameters().items():
            value.fill_(0.05 if "lora_B" in name else 0.1)
    again, same, _ = start(backbone, examples, 5)
    assert torch.equal(model.heads.weight, again.heads.weight)  # whatever the adapter was
    assert same == penalty
    right = n = 0
    backbone.adapter.reset(0)
    for group in group_by_prompt(examples, "gate"):
        rewards = model.score([group.row]).mean(1)
        for order in group.orders:
            better, worse = (
                order.answers if order.ranks[0] < order.ranks[1] else order.answers[::-1]
            )
            right += bool(rewards[better] > rewards[worse])
            n += 1
    assert n >= 20
    assert right / n > 0.8
    weights = model.heads.weight
    assert not torch.equal(weights[0], weights[1])


def test_labels_that_say_nothing_are_penalised_most(backbone: Backbone, make_pairs: Any) -> None:
    flips = torch.rand(150, generator=torch.Generator().manual_seed(3)) < 0.5
    examples = make_pairs(150)
    noise = [
        replace(e, ranks=e.ranks[::-1]) if flip else e
        for e, flip in zip(examples, flips.tolist(), strict=True)
    ]
    _, clean_penalty, _ = start(backbone, examples, 0)
    _, noise_penalty, _ = start(backbone, noise, 0)
    assert clean_penalty < noise_penalty


def test_thumbs_alone_give_heads_and_the_bar(backbone: Backbone) -> None:
    groups = []
    for number in range(20):  # one answer a prompt, liked where token 40 is in it
        group = Group((5, number))
        group.index((40, 41, 40) if number % 2 else (90, 91, 92))
        group.thumbs.append((0, bool(number % 2)))
        groups.append(group)
    model = RewardModel(backbone, Heads(2, backbone.hidden_size))
    weights_GE = torch.ones(20, 2)
    _, bar = start_heads(model, groups, SETTINGS, weights_GE, NoHooks())
    rewards_A = torch.cat([model.score([group.row]).mean(1) for group in groups])
    assert float(rewards_A.mean()) == pytest.approx(0, abs=1e-4)
    assert bar == pytest.approx(0, abs=0.05)
    assert rewards_A[1::2].min() > bar > rewards_A[::2].max()

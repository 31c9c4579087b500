"""Ties dropped, as the paper does: by hand, and in the whole objective."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_store import Failpoints
from heedful_trainer import reward_losses as rl
from heedful_trainer.backbone import Backbone
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import RewardSettings, TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.examples import Answer, Example
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import parts
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.reward.training import RewardObjective, train_reward

EOS = 258
PLAIN = RewardSettings(heads=2, centre_weight=0.0)


def test_a_tie_is_no_part_of_the_mean() -> None:
    # r = (2, 1, 0), the first two tied: pairs (0, 2) and (1, 2) are left.
    rewards = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = rl.ranking_loss(rewards, torch.tensor([0, 0, 1]), drop_ties=True)
    by_hand = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert rewards.grad is not None
    # -σ(-2)/2 and -σ(-1)/2; nothing pulls the tied ones together.
    expected = [-1 / (1 + math.exp(2)) / 2, -1 / (1 + math.exp(1)) / 2]
    assert rewards.grad[:2].tolist() == pytest.approx(expected)


def test_ties_alone_say_nothing_for_any_head() -> None:
    rewards = torch.tensor([[2.0, -1.0], [1.0, 5.0]], requires_grad=True)
    loss = rl.ranking_loss(rewards, torch.tensor([4, 4]), drop_ties=True)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.abs().max() == 0


def test_without_ties_nothing_changes() -> None:
    rewards, ranks = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([2, 0, 1])
    assert rl.ranking_loss(rewards, ranks, drop_ties=True) == rl.ranking_loss(rewards, ranks)


def tied(make_pairs: Any) -> list[Example]:
    """Rankings of three: two are as good as each other, the third is worse."""
    return [
        replace(e, answers=(*e.answers, Answer((9, 9, EOS))), ranks=(0, 0, 1))
        for e in make_pairs(12, split="train")
    ]


def objective(backbone: Backbone, examples: list[Example], drop_ties: bool) -> RewardObjective:
    backbone.adapter.reset(0)
    heads = Heads(2, backbone.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.17, generator=torch.Generator().manual_seed(0))
    settings = PLAIN.model_copy(update={"drop_ties": drop_ties})
    model = RewardModel(backbone, heads)
    return RewardObjective(model, settings, parts(examples)["train"], [], seed=0)


def test_the_objective_has_no_parameter_for_ties_and_the_loss_of_the_decided_pairs(
    backbone: Backbone, make_pairs: Any
) -> None:
    examples = tied(make_pairs)
    dropping = objective(backbone, examples, True)
    assert dropping.log_nu is None
    assert "log_nu" not in dropping.parameters()
    loss, _ = dropping.loss(range(12))
    # The same as two rankings of two for each prompt, without their tie.
    decided = [
        replace(e, seq=100 * k + e.seq, answers=(e.answers[k], e.answers[2]), ranks=(0, 1))
        for e in examples
        for k in (0, 1)
    ]
    expected, _ = objective(backbone, decided, True).loss(range(12))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    keeping = objective(backbone, examples, False)
    assert keeping.log_nu is not None
    assert keeping.loss(range(12))[0].item() != pytest.approx(expected.item(), rel=1e-2)


def test_it_learns_with_ties_dropped_and_refuses_ties_alone(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    dropping = with_overrides(config, {"reward.drop_ties": "true", "reward.epochs": "1"})

    def train(examples: list[Example], name: str) -> Any:
        store = CheckpointStore(tmp_path / name)
        return train_reward(backbone, parts(examples), dropping, store, NoHooks(), Failpoints())

    assert train(tied(make_pairs), "some").log_nu is None
    alone = [replace(e, ranks=(0, 0)) for e in make_pairs(12, split="train")]
    with pytest.raises(NotEnoughFeedback, match="0 of 8"):
        train(alone, "alone")

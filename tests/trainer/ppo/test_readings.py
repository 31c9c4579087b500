"""What of the heads is the reward: mean, least or the first alone, with numbers worked by hand."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from heedful_store import Failpoints
from heedful_trainer.errors import RunStopped
from heedful_trainer.packing import Row
from heedful_trainer.ppo.experience import RewardScale, experience_of, fit_scale, judge, read
from heedful_trainer.ppo.look import look_at
from heedful_trainer.ppo.loop import train_ppo
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.settings import PpoSettings, RewardShaping
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.rollouts.records import Rollout
from pydantic import ValidationError


def _tiny() -> ModuleType:
    # The file is a program too, so it is no conftest.
    spec = importlib.util.spec_from_file_location("ppo_tiny", Path(__file__).parent / "tiny.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_tiny"] = module
    spec.loader.exec_module(module)
    return module


tiny: Any = _tiny()

READINGS = ("mean", "least", "single")
# Two answers, three heads: means 1 and 2, least -1 and -2, first 1 and 3.
REWARDS_AE = torch.tensor([[1.0, -1.0, 3.0], [3.0, 5.0, -2.0]])
ROLLOUTS = (
    Rollout((5, 6), (7, 8, 9), (-1.0, -1.0, -1.0), True),
    Rollout((5, 6), (10, 11), (-1.0, -1.0), True),
)
ITEM = (Row((5, 6), tuple(rollout.answer for rollout in ROLLOUTS)), ROLLOUTS)


def plain(reading: str, **more: Any) -> PpoSettings:
    """No KL, no discount by λ, no guards: what is left of the reward is its reading."""
    shaping = {"reading": reading, "missing_end_penalty": 0.0, "length_penalty": 0.0}
    settings: PpoSettings = tiny.settings(reward=shaping, lam=1.0, **more)
    return settings


def networks_with(model_dir: Path, weight_E: list[float], bias_E: list[float]) -> Networks:
    """Networks whose heads are multiples of one random direction, with these biases."""
    backbone, _ = tiny.load_two(model_dir)
    heads = Heads(len(bias_E), backbone.hidden_size)
    with torch.no_grad():
        direction_H = torch.randn(backbone.hidden_size, generator=torch.Generator().manual_seed(4))
        heads.weight.copy_(torch.tensor(weight_E)[:, None] * direction_H)
        heads.bias.copy_(torch.tensor(bias_E))
    return Networks(RewardModel(backbone, heads), seed=3)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [("mean", [1.0, 2.0]), ("least", [-1.0, -2.0]), ("single", [1.0, 3.0])],
)
def test_each_reading_by_hand(reading: Any, expected: list[float]) -> None:
    assert read(REWARDS_AE, reading).tolist() == expected
    assert read(REWARDS_AE[:, :1], reading).tolist() == [1.0, 3.0]


def test_the_least_is_at_most_the_mean_and_the_single_is_the_first_head() -> None:
    rewards_AE = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    assert bool((read(rewards_AE, "least") <= read(rewards_AE, "mean")).all())
    assert torch.equal(read(rewards_AE, "single"), rewards_AE[:, 0])


def test_the_mean_is_the_default_and_nothing_else_has_a_name() -> None:
    assert RewardShaping().reading == "mean"
    with pytest.raises(ValidationError, match="reading"):
        RewardShaping.model_validate({"reading": "median"})


@pytest.mark.parametrize(
    ("reading", "gain", "shift", "model_reward", "scaled"),
    [
        ("mean", 2.0, -3.0, 1.5, [-1.0, 1.0]),
        ("least", 2.0, 3.0, -1.5, [1.0, -1.0]),
        ("single", 1.0, -2.0, 2.0, [-1.0, 1.0]),
    ],
)
def test_the_reading_is_what_is_scaled_and_what_the_tokens_return(
    tiny_model_dir: Path,
    reading: Any,
    gain: float,
    shift: float,
    model_reward: float,
    scaled: list[float],
) -> None:
    settings = plain(reading)
    networks = networks_with(tiny_model_dir, [0.0] * 3, [0.0] * 3)
    judged = replace(judge(networks, [ITEM]), rewards_AE=REWARDS_AE)
    scale = fit_scale([judged], settings.reward)
    assert (scale.gain, scale.shift) == pytest.approx((gain, shift))
    (experience,), figures = experience_of([judged], scale, 0.0, settings)
    assert figures["model_reward"] == pytest.approx(model_reward)
    assert figures["reward"] == pytest.approx(0.0, abs=1e-6)
    assert figures["reward_deviation"] == pytest.approx(1.0)
    # Without KL and at λ = 1 every token returns its answer's reward: three tokens, then two.
    expected = [scaled[0]] * 3 + [scaled[1]] * 2
    assert experience.returns_N.tolist() == pytest.approx(expected, abs=1e-5)


def test_as_the_model_gives_it_no_reading_is_scaled(tiny_model_dir: Path) -> None:
    networks = networks_with(tiny_model_dir, [0.0] * 3, [0.0] * 3)
    judged = replace(judge(networks, [ITEM]), rewards_AE=REWARDS_AE)
    for reading in READINGS:
        shaping = RewardShaping.model_validate({"reading": reading, "scale": "model"})
        scale = fit_scale([judged], shaping)
        assert (scale.gain, scale.shift) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("reading", "constant", "folded"),
    # Biases 3, -2 and 5: their mean is 2, and gain 2 with shift -1/2 makes of it 3.5.
    [("mean", 2.0, 3.5), ("least", 2.0, 3.5), ("single", 3.0, 5.5)],
)
def test_values_start_at_the_first_head_or_at_the_mean(
    tiny_model_dir: Path, reading: Any, constant: float, folded: float
) -> None:
    networks = networks_with(tiny_model_dir, [0.0] * 3, [3.0, -2.0, 5.0])
    networks.start_values(reading)
    assert judge(networks, [ITEM]).values_N.tolist() == pytest.approx([constant] * 5)
    networks.fold(2.0, -0.5)
    judged = judge(networks, [ITEM])
    assert judged.values_N.tolist() == pytest.approx([folded] * 5)
    # The reward itself is neither started anew nor folded.
    assert judged.rewards_AE.tolist() == [[3.0, -2.0, 5.0]] * 2


@pytest.mark.parametrize(("reading", "weight", "bias"), [("mean", 2.0, 1.0), ("single", 1.0, 4.0)])
def test_a_value_is_the_reward_of_an_answer_that_ends_there(
    tiny_model_dir: Path, reading: Any, weight: float, bias: float
) -> None:
    shorter = Row((5, 6), ((7, 8),))
    networks = networks_with(tiny_model_dir, [1.0, 3.0], [4.0, -2.0])
    networks.start_values(reading)
    value = float(judge(networks, [ITEM]).values_N[2])  # before token 9
    cut = replace(ROLLOUTS[0], answer=(7, 8), logprobs=(-1.0, -1.0))
    first, second = judge(networks, [(shorter, (cut,))]).rewards_AE[0].tolist()
    along = first - 4.0  # the hidden state along the heads' direction
    assert second == pytest.approx(3 * along - 2.0, abs=1e-4)
    assert value == pytest.approx(weight * along + bias, abs=1e-4)
    # The second answer's values know nothing of the first's.
    alone = (Row((5, 6), (ROLLOUTS[1].answer,)), ROLLOUTS[1:])
    both, single = judge(networks, [ITEM]).values_N, judge(networks, [alone]).values_N
    assert both[3:].tolist() == pytest.approx(single.tolist(), abs=1e-4)


@pytest.mark.parametrize("reading", READINGS)
def test_a_look_shows_every_reading_whichever_is_trained_against(
    tiny_model_dir: Path, reading: str
) -> None:
    scale = RewardScale(gain=2.0, shift=1.0)
    networks = networks_with(tiny_model_dir, [0.0] * 3, [3.0, -2.0, 5.0])
    found = look_at(networks, ROLLOUTS, scale, plain(reading))
    names = ("reward_mean", "reward_min", "reward_single")
    assert [found[name] for name in names] == pytest.approx([5.0, -3.0, 7.0])


@pytest.mark.parametrize("reading", ["least", "single"])
def test_a_stopped_run_of_any_reading_ends_in_the_same_bits(
    tiny_model_dir: Path, tmp_path: Path, reading: str
) -> None:
    config = plain(reading)
    _, whole, _ = tiny.run(tiny_model_dir, tmp_path / "whole", config)
    with (
        tiny.tiny_run(tiny_model_dir, tmp_path / "cut", config, checkpoint_s=1e9) as setup,
        pytest.raises(RunStopped, match="after iteration 3"),
    ):
        train_ppo(setup, tiny.StopAfter(3), Failpoints())
    _, weights, _ = tiny.run(tiny_model_dir, tmp_path / "cut", config)
    assert weights == whole
    _, other, _ = tiny.run(tiny_model_dir, tmp_path / "mean", plain("mean"))
    assert other != whole

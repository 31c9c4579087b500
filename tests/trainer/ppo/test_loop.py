"""The whole algorithm on a tiny model: it learns, stops when it must, and keeps what is good."""

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from heedful_store import Failpoints
from heedful_trainer.errors import RunStopped, StageFailed, TrainingFailed
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.packing import Row
from heedful_trainer.ppo.experience import RewardScale, judge
from heedful_trainer.ppo.loop import train_ppo
from heedful_trainer.ppo.watch import problem_with
from heedful_trainer.rollouts.local import LocalSource
from heedful_trainer.rollouts.records import Ids, Plan, Rollout


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


class Bent:
    """Samples as the local source does, and bends what it says from some plan on."""

    def __init__(self, model_dir: Path, run_dir: Path, bend: Any, plan: str) -> None:
        self.inner = LocalSource(tiny.load_two(model_dir)[1], run_dir / "adapters", tiny.EOS)
        self.bend, self.plan = bend, plan

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        found = await self.inner.draw(plan, start, prompts)
        return [self.bend(r) for r in found] if plan.name >= self.plan else found

    async def release(self, policy: str) -> None:
        pass


def bent_run(model_dir: Path, run_dir: Path, bend: Any, plan: str, **more: Any) -> Any:
    source = Bent(model_dir, run_dir, bend, plan)
    return tiny.run(model_dir, run_dir, tiny.settings(**more), source=source)


def test_reward_rises_on_a_bandit(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = tiny.settings(
        iterations=12,
        batch_episodes=48,
        max_answer_tokens=1,
        samples_per_prompt=4,
        kl={"max_nats": 1e6, "beta": 0.02, "target_nats": 0},
        stopping={"evaluate_every": 100, "prompts": 4},
        ptx={"ratio": 0.1},
    )
    result, _, _ = tiny.run(tiny_model_dir, tmp_path, config)
    rewards = [row["reward"] for row in result.history]
    assert result.ended == "iterations"
    assert result.episodes == 12 * 48
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert result.history[-1]["kl_nats"] > 0.05
    assert [look["iteration"] for look in result.looks] == [0.0, 12.0]
    assert all(row["ptx_norm"] > 0 and row["ppo_norm"] > 0 for row in result.history[1:])


def test_the_first_iteration_trains_only_the_values(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = tiny.settings(iterations=2)
    with tiny.tiny_run(tiny_model_dir, tmp_path, config) as setup:
        names = [setup.planner.training(i).policy for i in range(4)]
        assert names == ["", "", "", "ppo-000002"]
        before = {n: p.detach().clone() for n, p in setup.networks.value.items()}
        result = train_ppo(setup, NoHooks(), Failpoints())
        assert any(not torch.equal(before[n], p) for n, p in setup.networks.value.items())
    assert "policy_loss" not in result.history[0]
    assert "policy_loss" in result.history[1]
    assert result.history[1]["kl_nats"] == 0.0


def test_without_overlap_rollouts_are_of_the_policy_that_learns(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = tiny.settings(overlap=False)
    result, _, _ = tiny.run(tiny_model_dir, tmp_path / "on", config)
    behind, _, _ = tiny.run(tiny_model_dir, tmp_path / "behind", tiny.settings())
    assert result.history[-1]["mismatch_nats"] < 1e-4
    assert behind.history[-1]["mismatch_nats"] > 1e-3


def test_values_start_as_the_scaled_mean_reward_and_the_reference_is_the_base(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with tiny.tiny_run(tiny_model_dir, tmp_path, tiny.settings()) as setup:
        networks = setup.networks
        rollout = Rollout((5, 6), (7, 8, 9), (-1.0, -1.0, -1.0), True)
        item = (Row((5, 6), ((7, 8, 9),)), (rollout,))
        networks.fold(2.0, -0.5)
        judged = judge(networks, [item])
        assert torch.equal(judged.old_N, judged.reference_N)
        # The value before token 9 is the reward of an answer that ends at token 8.
        shorter = judge(networks, [(Row((5, 6), ((7, 8),)), (replace(rollout, answer=(7, 8)),))])
        expected = 2.0 * float(shorter.rewards_AE.mean()) - 0.5
        assert float(judged.values_N[2]) == pytest.approx(expected, abs=1e-4)
        with networks.policy_of({n: p.detach() + 0.1 for n, p in networks.policy.items()}):
            other = judge(networks, [item])
        assert not torch.allclose(other.old_N, judged.old_N)
        assert torch.equal(other.reference_N, judged.reference_N)
        assert torch.equal(other.rewards_AE, judged.rewards_AE)
        assert torch.equal(judge(networks, [item]).old_N, judged.old_N)


def test_a_policy_that_stops_ending_is_stopped_and_the_best_before_is_kept(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Late(Bent):
        async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
            found = await self.inner.draw(plan, start, prompts)
            is_late = plan.name.startswith("train") and plan.name >= "train-000003"
            return [replace(r, ended=not is_late) for r in found]

    late = Late(tiny_model_dir, tmp_path, None, "")
    result, _, networks = tiny.run(tiny_model_dir, tmp_path, tiny.settings(), source=late)
    assert "stopped ending its answers" in result.ended
    assert result.iterations == 3
    assert result.best_iteration in (2, 3)
    assert any(bool(p.abs().max() > 0) for n, p in networks.policy.items() if "lora_B" in n)


def test_log_probs_of_something_else_show_as_a_negative_kl(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def lower(rollout: Rollout) -> Rollout:
        return replace(rollout, logprobs=tuple(v - 1 for v in rollout.logprobs))

    with pytest.raises(TrainingFailed, match=r"KL .* negative .* no policy worth keeping"):
        bent_run(tiny_model_dir, tmp_path, lower, "")


def test_a_server_that_stays_away_ends_the_run_with_what_is_good(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Gone(Bent):
        async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
            if plan.name >= self.plan and plan.name.startswith("train"):
                raise StageFailed("the server did not answer for 180 s")
            return await self.inner.draw(plan, start, prompts)

    gone = Gone(tiny_model_dir, tmp_path / "late", None, "train-000003")
    result, _, _ = tiny.run(tiny_model_dir, tmp_path / "late", tiny.settings(), source=gone)
    assert result.ended == "the server did not answer for 180 s"
    assert result.best_iteration >= 2
    gone = Gone(tiny_model_dir, tmp_path / "early", None, "train-000000")
    with pytest.raises(StageFailed, match="did not answer"):
        tiny.run(tiny_model_dir, tmp_path / "early", tiny.settings(), source=gone)


def test_a_stopped_run_goes_on_where_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = tiny.settings()
    _, whole, _ = tiny.run(tiny_model_dir, tmp_path / "whole", config)
    with (
        tiny.tiny_run(tiny_model_dir, tmp_path / "cut", config, checkpoint_s=1e9) as setup,
        pytest.raises(RunStopped, match="after iteration 3"),
    ):
        train_ppo(setup, tiny.StopAfter(3), Failpoints())
    _, weights, _ = tiny.run(tiny_model_dir, tmp_path / "cut", config)
    assert weights == whole


FINE = {
    "reward": 0.1,
    "ended_share": 0.9,
    "sampled_kl_nats": 1.0,
    "sampled_kl_error": 0.2,
    "kl_nats": 1.0,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"reward": math.nan}, "reward is not finite"),
        ({"reward": -60.0}, "exploded"),
        ({"ended_share": 0.3}, "30% end, of the reference's 80%"),
        ({"sampled_kl_nats": -1.5}, ""),  # by chance
        ({"sampled_kl_nats": -2.5}, "negative"),
        ({"kl_nats": 12.25}, r"√KL 3.5"),
    ],
)
def test_each_rule_has_its_sentence(change: dict[str, float], says: str) -> None:
    scale = RewardScale(usual_length=10.0, usual_ended_share=0.8)
    found = problem_with({**FINE, **change}, scale, tiny.settings(kl={"max_nats": 10.0}))
    assert (says in found) if says else not found

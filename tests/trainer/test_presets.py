"""The preset `instructgpt`: every number is the paper's, and gives way to what is set beside it."""

from pathlib import Path
from typing import Any, get_args

import pytest
from heedful.cli.refresh import PresetChoice
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import load, with_overrides
from heedful_trainer.errors import InvalidConfig
from heedful_trainer.presets import PRESETS, Preset

INSTRUCTGPT = PRESETS["instructgpt"]
# An adapter learns at ten times the rate of whole weights; said in docs/explanation/instructgpt.md.
ADAPTER = 10

# Ouyang et al. 2022 (arXiv 2203.02155), appendix C, for 1.3B and 6B, written down from the paper.
PAPER: dict[str, Any] = {
    # C.1: "trained for 16 epochs, residual dropout of 0.2, cosine LR schedule down to 10% of the
    # original learning rate, with no learning rate warmup", LR 9.65e-6, batch 32; chosen by RM.
    "sft.epochs": 16,
    "sft.residual_dropout": 0.2,
    "sft.choose_by": "reward",
    "sft.optimiser.learning_rate": 9.65e-6 * ADAPTER,
    "sft.optimiser.batch_size": 32,
    "sft.optimiser.warmup_share": 0,
    "sft.optimiser.final_share": 0.1,
    # C.2: one epoch, LR 9e-6, cosine to 10 %, 64 prompts of a batch; one model; ties dropped.
    "reward.heads": 1,
    "reward.epochs": 1,
    "reward.drop_ties": True,
    "reward.optimiser.learning_rate": 9e-6 * ADAPTER,
    "reward.optimiser.batch_size": 64,
    "reward.optimiser.final_share": 0.1,
    # C.3: 2 epochs, 10 % pre-training data, LR 5e-6 (1.3B).
    "ppo.start.kind": "sft",
    "ppo.start.epochs": 2,
    "ppo.start.text_share": 0.1,
    "ppo.start.learning_rate": 5e-6 * ADAPTER,
    # C.4: batch 512, minibatch 64, one inner epoch, clip 0.2, warm-up of 10 iterations, β 0.02,
    # EMA 0.992, LR of the value function 9e-6, coefficient 27.8, 8 times as many texts.
    "ppo.batch_episodes": 512,
    "ppo.minibatches": 512 // 64,
    "ppo.inner_epochs": 1,
    "ppo.clip": 0.2,
    "ppo.warmup_iterations": 10,
    "ppo.kl.beta": 0.02,
    "ppo.kl.target_nats": 0,
    "ppo.ema.decay": 0.992,
    "ppo.value_learning_rate": 9e-6 * ADAPTER,
    "ppo.ptx.weight": "gamma",
    "ppo.ptx.gamma": 27.8,
    "ppo.ptx.texts_per_episode": 8,
    "ppo.samples_per_prompt": 1,
    "method": "ppo_ptx",
}
# What the paper leaves open, and what turns off what it does not have.
OURS: dict[str, Any] = {
    "lora.rank": 64,
    "lora.alpha": 64,
    "lora.trained_share": 1,
    "sft.optimiser.min_steps": 0,
    "reward.patience": 1000,
    "reward.centre_weight": 0,
    "reward.thumb_weight": 0,
    "reward.correction_weight": 0,
    "reward.optimiser.warmup_share": 0,
    "reward.optimiser.min_steps": 0,
    "ppo.iterations": 500,
    "ppo.value_only_iterations": 0,
    "ppo.max_answer_tokens": 1024,
    "ppo.policy_learning_rate": 8.05e-6 * ADAPTER,
    "ppo.lam": 0.95,
    "ppo.overlap": False,
    "ppo.kl.max_nats": 1000,
    "ppo.ptx.texts": 4096,
    "ppo.ptx.max_tokens": 1024,
    "ppo.reward.scale": "model",
    "ppo.reward.missing_end_penalty": 0,
    "ppo.reward.length_penalty": 0,
    "ppo.stopping.evaluate_every": 25,
    "ppo.stopping.patience": 1000,
}


def at(config: TrainerConfig, path: str) -> Any:
    found: Any = config.model_dump()
    for key in path.split("."):
        found = found[key]
    return found


def test_every_number_is_the_papers_or_is_said_to_be_ours() -> None:
    config = with_overrides(TrainerConfig(), {"preset": "instructgpt"})
    assert sorted({**PAPER, **OURS}) == sorted(INSTRUCTGPT)
    for path, value in {**PAPER, **OURS}.items():
        assert at(config, path) == pytest.approx(value), path


def test_the_papers_totals() -> None:
    ppo = with_overrides(TrainerConfig(), {"preset": "instructgpt"}).ppo
    assert ppo.iterations * ppo.batch_episodes == 256_000
    texts_of_a_step = ppo.ptx.texts_per_episode * ppo.batch_episodes / ppo.minibatches
    assert texts_of_a_step == 8 * 64
    # Read as a whole once in an iteration.
    assert texts_of_a_step * ppo.minibatches == ppo.ptx.texts


def test_without_a_preset_nothing_of_it_is_set() -> None:
    assert with_overrides(TrainerConfig(), {"preset": "none"}) == TrainerConfig()
    assert TrainerConfig().ppo.ptx.weight == "ratio"


def test_what_a_run_sets_beside_it_wins_in_any_order() -> None:
    for overrides in (
        {"preset": "instructgpt", "ppo.kl.beta": "0.1", "method": "sft"},
        {"method": "sft", "ppo.kl.beta": "0.1", "preset": "instructgpt"},
    ):
        config = with_overrides(TrainerConfig(), overrides)
        assert (config.ppo.kl.beta, config.method) == (0.1, "sft")
        assert config.ppo.ptx.gamma == 27.8


def test_file_environment_and_command_line_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "heedful.toml"
    file.write_text('[trainer]\npreset = "instructgpt"\n[trainer.ppo]\niterations = 7\n')
    environ = {"HEEDFUL_TRAINER__PPO__BATCH_EPISODES": "16"}
    ppo = load(file, environ, [("ppo.minibatches", "2")]).trainer.ppo
    assert (ppo.iterations, ppo.batch_episodes, ppo.minibatches) == (7, 16, 2)
    assert ppo.ema.decay == 0.992


def test_a_runs_preset_wins_over_the_trainers_own_settings() -> None:
    own = with_overrides(TrainerConfig(), {"ppo.kl.beta": "0.3"})
    assert with_overrides(own, {"preset": "instructgpt"}).ppo.kl.beta == 0.02


def test_a_resolved_run_comes_back_as_it_was() -> None:
    config = with_overrides(TrainerConfig(), {"preset": "instructgpt", "ppo.kl.beta": "0.1"})
    flat = {path: at(config, path) for path in [*INSTRUCTGPT, "preset"]}
    assert with_overrides(TrainerConfig(), flat) == config


def test_the_command_line_knows_every_preset() -> None:
    assert [choice.value for choice in PresetChoice] == list(get_args(Preset)) == list(PRESETS)


def test_a_misspelt_preset_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"trainer\.preset: .*'instructgpt'"):
        with_overrides(TrainerConfig(), {"preset": "instructgtp"})

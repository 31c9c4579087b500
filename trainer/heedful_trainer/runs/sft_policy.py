"""The policy stage of a run by SFT where the reward model chooses the epoch (C.1 of the paper).

Owns that choice: after each epoch the server answers validation prompts with the policy as it is,
and the epoch whose answers the reward model likes best is taken, whatever the validation loss says
(Ouyang et al. 2022: it overfits after one epoch, and more training helps all the same). Training
thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from heedful_trainer.checkpoint import hash_of
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.dropout import residual_dropout
from heedful_trainer.methods.loop import LoopResult, LoopSettings, Objective, train
from heedful_trainer.methods.policy import parts
from heedful_trainer.methods.sft import SftObjective
from heedful_trainer.ppo.experience import micro_batches
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.reward.model import load_reward_model
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Ids, Plan, rows_of
from heedful_trainer.rollouts.store import RolloutStore
from heedful_trainer.runs.context import RunContext
from heedful_trainer.runs.ppo_policy import ROLLOUTS, prompts_of, save_adapter, server_source


def train_sft_by_reward(context: RunContext) -> LoopResult:
    """Train on what people wrote; the backbone wears the epoch that the reward model likes best.

    Raises:
        NotEnoughFeedback: there is no reward model, or no validation prompt.
        TrainingFailed, StageFailed, RunStopped: of the loop and of the sampling.
    """
    config, seed = context.config, context.config.run.seed
    reward_dir = context.adapter_dir("reward")
    prompts = prompts_of(context, train=False).validation
    if not reward_dir.is_dir() or not prompts:
        there = {"reward models": (int(reward_dir.is_dir()), 1), "prompts": (len(prompts), 1)}
        raise NotEnoughFeedback("sft", there, "sft.choose_by is reward")
    networks = Networks(load_reward_model(context.backbone, reward_dir), seed)
    groups = parts(context.examples)
    store = RolloutStore(context.directory / ROLLOUTS, context.failpoints)
    part = config.ppo.rollouts.part_prompts
    with (
        RolloutDrawer(server_source(context), store, part) as drawer,
        residual_dropout(context.backbone, config.sft.residual_dropout, seed),
    ):
        inner = SftObjective(context.scorer, networks.policy, groups["train"], groups["validation"])
        chosen = _ByReward(inner, networks, drawer, prompts, context)
        return train(
            chosen,
            LoopSettings(
                epochs=config.sft.epochs,
                seed=seed,
                optimiser=config.sft.optimiser,
                checkpoint_s=config.run.checkpoint_s,
                compute_cap_s=config.run.compute_cap_s,
                evaluations=1,
                patience=int(config.sft.epochs) + 1,
            ),
            context.checkpoints("policy"),
            context.hooks,
            context.failpoints,
        )


class _ByReward:
    """An objective whose validation loss is the reward of sampled answers, negated."""

    def __init__(
        self,
        inner: Objective,
        networks: Networks,
        drawer: RolloutDrawer,
        prompts: Sequence[Ids],
        context: RunContext,
    ) -> None:
        self._inner, self._networks, self._drawer = inner, networks, drawer
        self._prompts, self._context = tuple(prompts), context

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each example."""
        return self._inner.sizes

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained."""
        return self._inner.parameters()

    def begin_step(self, batch: Sequence[int]) -> None:
        """As the inner objective does."""
        self._inner.begin_step(batch)

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """As the inner objective does."""
        return self._inner.loss(examples)

    def evaluate(self) -> Mapping[str, float]:
        """Return the negated mean reward as the loss, beside the language-model loss."""
        context, settings = self._context, self._context.config.ppo
        # A policy is named by what it is: after a kill the same epoch finds its own rollouts.
        name = f"ppo-sft-{_digest(self._networks.policy)}"
        save_adapter(context, name)
        tokens, seed = settings.max_answer_tokens, context.config.run.seed
        plan = Plan(f"look-{name}", name, self._prompts, 1, tokens, seed)
        rollouts = self._drawer.take(plan, context.hooks)
        self._drawer.release(name)
        shutil.rmtree(context.adapter_dir(name), ignore_errors=True)
        backbone = self._networks.backbone
        rewards = [
            self._networks.rewards(backbone.batch([row for row, _ in items], keep=False)).mean(1)
            for items in micro_batches(rows_of(rollouts), settings.micro_batch_tokens)
        ]
        reward = float(torch.cat(rewards).mean())
        return {**self._inner.evaluate(), "loss": -reward, "reward": reward}


def _digest(parameters: Mapping[str, nn.Parameter]) -> str:
    return hash_of(dict(parameters))[:16]

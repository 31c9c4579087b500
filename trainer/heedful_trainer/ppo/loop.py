"""PPO-ptx (Ouyang et al. 2022, C.4, https://arxiv.org/abs/2203.02155): the algorithm on one page.

    rollouts (stored, then used) -> rewards -> values -> advantages -> minibatches, each one step
    with ptx -> average of weights -> now and then a look at validation prompts -> the best average

Owns this order, and what is kept when it ends early. The equations are in `advantages`,
`ppo_losses`, `ptx` and `ema`. A killed run goes on from the last iteration and, given the same
stored rollouts, ends in the same weights bit for bit. Training thread; the number of compute
threads must not change within a run.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
from heedful_store import Failpoints
from torch import Tensor

from heedful_trainer.advantages import KlController
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.ema import Ema, decay_for
from heedful_trainer.errors import RunStopped, StageFailed, TrainingFailed
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.ppo.experience import (
    Experience,
    experience_of,
    fit_scale,
    judge,
    minibatches_of,
)
from heedful_trainer.ppo.look import look_at
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.plans import Planner
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.ppo.state import Progress, from_checkpoint, to_checkpoint
from heedful_trainer.ppo.texts import PtxTexts
from heedful_trainer.ppo.update import Updater
from heedful_trainer.ppo.watch import problem_with
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Rollout


@dataclass(frozen=True, slots=True)
class Setup:
    """What PPO works with."""

    networks: Networks
    texts: PtxTexts
    drawer: RolloutDrawer
    planner: Planner
    save_policy: Callable[[str], None]  # puts what the backbone wears where the sampler finds it
    drop_policy: Callable[[str], None]
    checkpoints: CheckpointStore
    settings: PpoSettings
    seed: int
    checkpoint_s: float = 0.0  # between two checkpoints
    compute_cap_s: float = 0.0  # 0: none


@dataclass(frozen=True, slots=True)
class PpoResult:
    """What training came to; the backbone wears the best averaged policy."""

    iterations: int
    episodes: int
    tokens: int  # of answers
    seconds: float
    ended: str  # "iterations", "patience", "compute_cap", or what went wrong
    best_iteration: int
    skipped_steps: int
    beta: float
    history: list[dict[str, float]]
    looks: list[dict[str, float]]


def train_ppo(setup: Setup, hooks: Hooks, failpoints: Failpoints) -> PpoResult:
    """Train a policy from the base, or go on from the newest checkpoint.

    Raises:
        TrainingFailed: something went wrong before there was a policy worth keeping.
        StageFailed: server or disk failed, likewise.
        RunStopped: hooks asked for the end; the last iteration is kept.
    """
    return _Ppo(setup, hooks, failpoints).run()


class _Ppo:
    def __init__(self, setup: Setup, hooks: Hooks, failpoints: Failpoints) -> None:
        self._setup, self._hooks, self._failpoints = setup, hooks, failpoints
        settings = self._settings = setup.settings
        learning = settings.iterations - settings.value_only_iterations
        decay = settings.ema.decay or decay_for(settings.ema.half_life_share, max(1, learning))
        setup.networks.start_values(settings.reward.reading)
        self._updater = Updater(setup.networks, settings)
        self._average = Ema(decay)
        self._saved_at = time.monotonic()
        self._progress = Progress(KlController(settings.kl.beta, settings.kl.target_nats))

    def run(self) -> PpoResult:
        self._resume()
        try:
            ended = self._iterate()
        except (StageFailed, OSError) as error:
            # The server is gone or the disk is full. What was found good is in memory.
            ended = str(error)
            if not self._progress.best:
                raise
        return self._finish(ended)

    def _iterate(self) -> str:
        """Return why it ended."""
        setup, progress = self._setup, self._progress
        while progress.iteration < self._settings.iterations:
            started = time.monotonic()
            rollouts = self._rollouts()
            experience, figures = self._judge(rollouts)
            assert progress.scale is not None
            if problem := problem_with(figures, progress.scale, self._settings):
                return problem
            figures |= self._learn(experience)
            if self._updater.bad_steps >= self._settings.stopping.max_bad_steps:
                return f"{self._updater.bad_steps} steps in a row were not finite"
            if progress.iteration >= self._settings.value_only_iterations:
                self._average.update(setup.networks.policy)
                progress.controller = progress.controller.updated(figures["kl_nats"])
            self._advance(rollouts, figures, time.monotonic() - started)
            if self._is_looking() and self._look():
                return "patience"
            if 0 < setup.compute_cap_s <= progress.seconds:
                return "compute_cap"
            self._save_if_due()
            self._obey()
        return "iterations"

    def _rollouts(self) -> list[Rollout]:
        """Return this iteration's rollouts, and have the next ones drawn meanwhile."""
        setup, iteration = self._setup, self._progress.iteration
        if setup.planner.is_changed(iteration):
            setup.save_policy(setup.planner.policy_after(iteration))
        plan = setup.planner.training(iteration)
        rollouts = setup.drawer.take(plan, self._hooks)
        self._failpoints.hit("rollouts_taken")
        following = setup.planner.training(iteration + 1)
        if self._settings.overlap and iteration + 1 < self._settings.iterations:
            setup.drawer.begin(following)
        if plan.policy != following.policy:
            setup.drawer.release(plan.policy)
        # A policy's files outlive its rollouts by an iteration: a damaged part is drawn again.
        if setup.planner.is_changed(old := setup.planner.drawn_from(iteration) - 1):
            setup.drop_policy(setup.planner.policy_after(old))
        return rollouts

    def _judge(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[list[list[Experience]], dict[str, float]]:
        """Run policy, reference, value and reward over the rollouts."""
        progress, settings = self._progress, self._settings
        seed = self._setup.seed * 1_000_003 + progress.iteration
        minibatches = minibatches_of(rollouts, settings, seed)
        judged = []
        for items in (items for minibatch in minibatches for items in minibatch):
            judged.append(judge(self._setup.networks, items))
            self._hooks.breathe()
        if progress.scale is None:
            scale = progress.scale = fit_scale(judged, settings.reward)
            self._setup.networks.fold(scale.gain, scale.shift)
            judged = [
                replace(part, values_N=scale.gain * part.values_N + scale.shift) for part in judged
            ]
            self._look()
        beta = progress.controller.beta
        experience, figures = experience_of(judged, progress.scale, beta, settings)
        parts = iter(experience)
        return [[next(parts) for _ in minibatch] for minibatch in minibatches], dict(figures)

    def _learn(self, minibatches: Sequence[Sequence[Experience]]) -> dict[str, float]:
        """Take the optimiser steps; return the means of their figures."""
        settings = self._settings
        count = round(
            settings.ptx.texts_per_episode * settings.batch_episodes / settings.minibatches
        )
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(settings.inner_epochs):
            for minibatch in minibatches:
                is_learning = self._progress.iteration >= settings.value_only_iterations
                wanted = max(1, count) if self._updater.wants_text and is_learning else 0
                texts = self._setup.texts.next(wanted)
                figures = self._updater.step(
                    minibatch, texts, self._progress.iteration, self._hooks
                )
                for name, value in figures.items():
                    sums[name].append(value)
                self._failpoints.hit("ppo_step")
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _advance(
        self, rollouts: Sequence[Rollout], figures: Mapping[str, float], seconds: float
    ) -> None:
        progress = self._progress
        progress.iteration += 1
        progress.episodes += len(rollouts)
        progress.tokens += sum(len(rollout.answer) for rollout in rollouts)
        progress.seconds += seconds
        shown = {
            **figures,
            "beta": progress.controller.beta,
            "episodes": float(progress.episodes),
            "episodes_per_second": progress.episodes / progress.seconds,
        }
        progress.history.append({"iteration": float(progress.iteration), **shown})
        share = progress.iteration / self._settings.iterations
        self._hooks.report(share, shown, progress.iteration)

    def _is_looking(self) -> bool:
        done = self._progress.iteration
        due = done % self._settings.stopping.evaluate_every == 0
        return bool(self._average.num_updates) and (due or done == self._settings.iterations)

    def _look(self) -> bool:
        """Look at validation prompts; keep what is best so far; return whether to end."""
        setup, progress = self._setup, self._progress
        average = self._average.average() if self._average.num_updates else {}
        name = f"ppo-average-{progress.iteration:06d}" if average else setup.planner.start
        plan = setup.planner.validation(progress.iteration, name)
        if plan is None:
            progress.best, progress.best_iteration = average, progress.iteration
            return False
        assert progress.scale is not None
        weights = average or {n: p.detach() for n, p in setup.networks.policy.items()}
        with setup.networks.policy_of(weights):
            if average:
                setup.save_policy(name)
            rollouts = setup.drawer.take(plan, self._hooks)
            figures = look_at(setup.networks, rollouts, progress.scale, self._settings)
        if average:
            setup.drawer.release(name)
            setup.drop_policy(name)
        progress.looks.append({"iteration": float(progress.iteration), **figures})
        shown = {f"validation_{key}": value for key, value in figures.items()}
        self._hooks.report(
            progress.iteration / self._settings.iterations, shown, progress.iteration
        )
        return bool(average) and self._is_out_of_patience(average, figures)

    def _is_out_of_patience(
        self, average: Mapping[str, Tensor], figures: Mapping[str, float]
    ) -> bool:
        progress, score = self._progress, figures["reward_min"]
        within = figures["kl_nats"] <= self._settings.kl.max_nats
        if within and math.isfinite(score) and score > progress.best_score:
            progress.best_score, progress.best_iteration = score, progress.iteration
            progress.best, progress.waits = dict(average), 0
        else:
            progress.waits += 1
        return progress.waits >= self._settings.stopping.patience

    def _finish(self, ended: str) -> PpoResult:
        """Take the best average; one that nobody has looked at yet is looked at first."""
        progress = self._progress
        looked = progress.looks[-1]["iteration"] if progress.looks else -1.0
        if self._average.num_updates and looked < progress.iteration:
            try:
                self._look()
            except StageFailed as error:
                structlog.get_logger().warning("last_look_left_out", reason=str(error))
        if not progress.best:
            raise TrainingFailed(f"{ended}; there was no policy worth keeping yet")
        self._setup.networks.set_policy(progress.best)
        return PpoResult(
            progress.iteration,
            progress.episodes,
            progress.tokens,
            progress.seconds,
            ended,
            progress.best_iteration,
            self._updater.skipped,
            progress.controller.beta,
            list(progress.history),
            list(progress.looks),
        )

    def _obey(self) -> None:
        wanted = self._hooks.wanted()
        if wanted == "go":
            return
        self._save()
        if wanted == "stop":
            raise RunStopped(f"stopped after iteration {self._progress.iteration}")
        self._hooks.wait_while_paused()

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved_at >= self._setup.checkpoint_s:
            self._save()

    def _save(self) -> None:
        self._setup.checkpoints.save(
            to_checkpoint(
                self._progress,
                self._setup.networks,
                self._updater,
                self._average,
                self._setup.texts,
            )
        )
        self._saved_at = time.monotonic()
        self._failpoints.hit("ppo_saved")

    def _resume(self) -> None:
        checkpoint = self._setup.checkpoints.load_newest()
        if checkpoint is not None:
            self._progress = from_checkpoint(
                checkpoint,
                self._setup.networks,
                self._updater,
                self._average,
                self._setup.texts,
            )

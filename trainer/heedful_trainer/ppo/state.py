"""Everything that PPO must remember between two iterations, and its way to a checkpoint and back.

Owns the state: weights and moments of policy and value function, the average, the best snapshot,
the controller, the reward's scale, the cursors, the random generator. Prompts, seeds and learning
rates follow from the iteration. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from heedful_trainer.advantages import KlController
from heedful_trainer.checkpoint import Checkpoint, hash_of
from heedful_trainer.ema import Ema
from heedful_trainer.errors import CheckpointDamaged
from heedful_trainer.ppo.experience import RewardScale
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.texts import PtxTexts
from heedful_trainer.ppo.update import Updater


@dataclass(slots=True)
class Progress:
    """Where training stands."""

    controller: KlController
    iteration: int = 0  # that comes next
    scale: RewardScale | None = None  # known after the first rollouts
    episodes: int = 0
    tokens: int = 0  # of answers
    seconds: float = 0.0
    waits: int = 0  # looks without a better score
    best_score: float = -math.inf
    best_iteration: int = -1
    best: dict[str, Tensor] = field(default_factory=dict)  # averaged weights
    history: list[dict[str, float]] = field(default_factory=list)  # of iterations
    looks: list[dict[str, float]] = field(default_factory=list)  # at validation prompts


def to_checkpoint(
    progress: Progress, networks: Networks, updater: Updater, average: Ema, texts: PtxTexts
) -> Checkpoint:
    """Return the state as a checkpoint."""
    moments = updater.state()
    tensors: dict[str, Tensor] = {
        **{f"policy.{name}": value.detach() for name, value in networks.policy.items()},
        **{f"value.{name}": value.detach() for name, value in networks.value.items()},
        **{f"moment.{name}": value for name, value in moments.items()},
        **{f"average.{name}": value for name, value in average.sums.items()},
        **{f"best.{name}": value for name, value in progress.best.items()},
        # Nothing here draws from it today; a dropout of tomorrow would.
        "rng": torch.get_rng_state(),
    }
    score = progress.best_score
    meta = {
        "optimiser_sha256": hash_of(moments),
        "controller": asdict(progress.controller),
        "scale": None if progress.scale is None else asdict(progress.scale),
        "episodes": progress.episodes,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "waits": progress.waits,
        "best_score": score if math.isfinite(score) else None,
        "best_iteration": progress.best_iteration,
        "history": progress.history,
        "looks": progress.looks,
        "average_updates": average.num_updates,
        "texts_cursor": texts.cursor,
        "bad_steps": updater.bad_steps,
        "skipped_steps": updater.skipped,
    }
    return Checkpoint(progress.iteration, tensors, meta)


def from_checkpoint(
    checkpoint: Checkpoint, networks: Networks, updater: Updater, average: Ema, texts: PtxTexts
) -> Progress:
    """Give every part its state back and return where training stands.

    Raises:
        CheckpointDamaged: the optimisers' state did not arrive.
    """
    tensors, meta = checkpoint.tensors, checkpoint.meta
    with torch.no_grad():
        for name, parameter in networks.policy.items():
            parameter.copy_(tensors[f"policy.{name}"])
        for name, parameter in networks.value.items():
            parameter.copy_(tensors[f"value.{name}"])
    updater.restore(_below(tensors, "moment."))
    if hash_of(updater.state()) != meta["optimiser_sha256"]:
        raise CheckpointDamaged(
            f"iteration {checkpoint.step}: the optimisers' state did not arrive"
        )
    updater.bad_steps, updater.skipped = meta["bad_steps"], meta["skipped_steps"]
    average.restore(_below(tensors, "average."), meta["average_updates"])
    texts.cursor = meta["texts_cursor"]
    torch.set_rng_state(tensors["rng"])
    score, scale = meta["best_score"], meta["scale"]
    return Progress(
        controller=KlController(**meta["controller"]),
        iteration=checkpoint.step,
        scale=None if scale is None else RewardScale(**scale),
        episodes=meta["episodes"],
        tokens=meta["tokens"],
        seconds=meta["seconds"],
        waits=meta["waits"],
        best_score=-math.inf if score is None else score,
        best_iteration=meta["best_iteration"],
        best=_below(tensors, "best."),
        history=list(meta["history"]),
        looks=list(meta["looks"]),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.clone()
        for name, value in tensors.items()
        if name.startswith(prefix)
    }

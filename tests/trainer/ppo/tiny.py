"""A tiny PPO run: a random model, a random reward model, a sampler of its own; also a program.

As a program it imports everything once and then runs (or goes on with) one training for each line
of its standard input, each in a forked process that a failpoint may kill; it prints the process's
exit status, and the training itself prints the hash of what it ended in.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from heedful_store import Failpoints
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.checkpoint import CheckpointStore, hash_of
from heedful_trainer.methods.hooks import NoHooks, Wanted
from heedful_trainer.ppo.loop import PpoResult, Setup, train_ppo
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.plans import Planner
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.ppo.texts import PtxTexts
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.rollouts.drawing import RolloutDrawer, Source
from heedful_trainer.rollouts.local import LocalSource
from heedful_trainer.rollouts.store import RolloutStore

EOS = 258
OPTIONS = BackboneOptions("float32", 4, 8.0, 0.5, 1 << 26)
PROMPTS = [(i + 1, 2 * i + 3) for i in range(12)]
VALIDATION = [(200 + i, 7) for i in range(6)]
TEXTS = [tuple(range(i, i + 8)) for i in range(1, 17)]
QUICK: dict[str, Any] = {
    "iterations": 4,
    "batch_episodes": 8,
    "samples_per_prompt": 2,
    "minibatches": 2,
    "max_answer_tokens": 5,
    "policy_learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "warmup_iterations": 1,
    "stopping": {"evaluate_every": 2, "prompts": 4, "patience": 50},
    "rollouts": {"part_prompts": 4},
    "kl": {"max_nats": 1e6},
    "reward": {"missing_end_penalty": 0.0, "length_penalty": 0.0},
}


def settings(**more: Any) -> PpoSettings:
    return PpoSettings.model_validate({**QUICK, **more})


def load_two(model_dir: Path) -> tuple[Backbone, Backbone]:
    """One to train, one to sample from."""
    return load_backbone(model_dir, OPTIONS), load_backbone(model_dir, OPTIONS)


def reward_model(backbone: Backbone) -> RewardModel:
    """A reward of the answer's last tokens that nobody trained."""
    backbone.adapter.reset(11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in backbone.adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    heads = Heads(3, backbone.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.17, generator=torch.Generator().manual_seed(13))
    return RewardModel(backbone, heads)


class StopAfter(NoHooks):
    """Asks for the end once an iteration is done.

    How often a loop asks depends on how long rollouts take, so that is not counted. Choose an
    iteration without a look: a stop may otherwise come while that is drawn.
    """

    def __init__(self, iteration: int) -> None:
        self._iteration, self._wanted = iteration, False

    def report(self, fraction: float, figures: Mapping[str, float], step: int) -> None:
        self._wanted = step == self._iteration

    def wanted(self) -> Wanted:
        return "stop" if self._wanted else "go"


class Folder:
    """The adapters of a run, unsealed."""

    def __init__(self, backbone: Backbone, directory: Path) -> None:
        self._backbone, self.directory = backbone, directory

    def save(self, name: str) -> None:
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        self._backbone.adapter.save(path, "tiny")

    def drop(self, name: str) -> None:
        pass


@contextmanager
def tiny_run(
    model_dir: Path,
    run_dir: Path,
    config: PpoSettings,
    failpoints: Failpoints | None = None,
    source: Source | None = None,
    backbones: tuple[Backbone, Backbone] | None = None,
    **more: Any,
) -> Iterator[Setup]:
    """Everything for one run below a directory."""
    backbone, sampler = backbones or load_two(model_dir)
    folder = Folder(backbone, run_dir / "adapters")
    drawn_by = source or LocalSource(sampler, folder.directory, EOS)
    store = RolloutStore(run_dir / "rollouts", failpoints or Failpoints())
    with RolloutDrawer(drawn_by, store, config.rollouts.part_prompts) as drawer:
        yield Setup(
            networks=Networks(reward_model(backbone), seed=3),
            texts=PtxTexts(TEXTS, backbone, 3, config.micro_batch_tokens),
            drawer=drawer,
            planner=Planner(PROMPTS, VALIDATION, config, 3),
            save_policy=folder.save,
            drop_policy=folder.drop,
            checkpoints=CheckpointStore(run_dir / "checkpoints"),
            settings=config,
            seed=3,
            **more,
        )


def run(
    model_dir: Path,
    run_dir: Path,
    config: PpoSettings,
    failpoints: Failpoints | None = None,
    **more: Any,
) -> tuple[PpoResult, str, Networks]:
    """Train and return the result, the hash of all weights, and the networks."""
    failpoints = failpoints or Failpoints()
    with tiny_run(model_dir, run_dir, config, failpoints, **more) as setup:
        result = train_ppo(setup, NoHooks(), failpoints)
    tensors = {f"policy.{n}": p.detach() for n, p in setup.networks.policy.items()}
    tensors |= {f"value.{n}": p.detach() for n, p in setup.networks.value.items()}
    return result, hash_of(tensors), setup.networks


def main(model_dir: str) -> None:
    torch.set_num_threads(1)
    backbones = load_two(Path(model_dir))
    for line in sys.stdin:
        run_dir, traps = json.loads(line)
        child = os.fork()
        if not child:
            result, weights, _ = run(
                Path(model_dir),
                Path(run_dir),
                settings(),
                Failpoints(traps),
                backbones=backbones,
            )
            figures = asdict(result) | {"seconds": 0.0}
            for row in figures["history"]:
                row.pop("episodes_per_second")
            Path(run_dir, "end.json").write_text(json.dumps([weights, figures]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

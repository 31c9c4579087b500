"""The policy stage of a run by PPO-ptx: what the algorithm needs, from the run's surroundings.

Owns which prompts it asks, where texts come from, how a policy under training reaches the server
(sealed below the run's directory, loaded from there), and the start that the policy is measured
against. The algorithm is `ppo.loop`. Training thread.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import heedful
import structlog
from heedful.prompt_file import read_prompts
from heedful_store import AdapterDamaged, adapter_files
from torch import Tensor

from heedful_trainer.config import TrainerConfig
from heedful_trainer.dataset.examples import Example, Split
from heedful_trainer.errors import InvalidConfig, NotEnoughFeedback, StageFailed
from heedful_trainer.lora import read_weights
from heedful_trainer.methods.loop import LoopSettings, train
from heedful_trainer.methods.policy import parts
from heedful_trainer.ppo.loop import PpoResult, Setup, train_ppo
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.plans import Planner
from heedful_trainer.ppo.report import plots_of
from heedful_trainer.ppo.rl_init import RlInitObjective, mixed_rows
from heedful_trainer.ppo.texts import (
    PtxTexts,
    cache_path,
    corpus_texts,
    reference_texts,
    start_token,
)
from heedful_trainer.reward.model import load_reward_model
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Ids, Plan
from heedful_trainer.rollouts.server import ServerSettings, ServerSource
from heedful_trainer.rollouts.store import RolloutStore
from heedful_trainer.runs.connecting import async_client
from heedful_trainer.runs.context import RunContext, write_whole

ROLLOUTS = "rollouts"
_START = "ppo-start"
_METHOD = "ppo_ptx"
_SAMPLES_OF_TEXT = 16
# Fewer prompts to choose a snapshot by than this are helped out by those for calibration.
_FEWEST_VALIDATION = 8


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is asked."""

    train: list[Ids]
    validation: list[Ids]


def train_by_ppo(context: RunContext) -> PpoResult:
    """Train the policy; the backbone wears the best average afterwards.

    Raises:
        NotEnoughFeedback: there is no reward model, or no prompt.
        TrainingFailed, StageFailed, RunStopped: of the algorithm.
    """
    settings, seed = context.config.ppo, context.config.run.seed
    reward_dir = context.adapter_dir("reward")
    if not reward_dir.is_dir():
        why = context.run.evidence["reward"].get("skipped", "it was not trained")
        raise NotEnoughFeedback(_METHOD, {"reward models": (0, 1)}, str(why))
    prompts = prompts_of(context)
    store = RolloutStore(context.directory / ROLLOUTS, context.failpoints)
    with RolloutDrawer(server_source(context), store, settings.rollouts.part_prompts) as drawer:
        texts = _texts(context, drawer)
        start = _start(context, texts)
        networks = Networks(load_reward_model(context.backbone, reward_dir), seed, start)
        batch_tokens = settings.micro_batch_tokens
        setup = Setup(
            networks=networks,
            texts=PtxTexts(texts, context.backbone, seed, batch_tokens),
            drawer=drawer,
            planner=Planner(
                prompts.train, prompts.validation, settings, seed, "" if start is None else _START
            ),
            save_policy=lambda name: save_adapter(context, name),
            drop_policy=lambda name: shutil.rmtree(context.adapter_dir(name), ignore_errors=True),
            checkpoints=context.checkpoints("policy"),
            settings=settings,
            seed=seed,
            checkpoint_s=context.config.run.checkpoint_s,
            compute_cap_s=context.config.run.compute_cap_s,
        )
        return train_ppo(setup, context.hooks, context.failpoints)


def write_ppo_report(context: RunContext, result: PpoResult) -> None:
    """Leave every iteration, every look and the plots in the run's report."""
    context.write_json("ppo.json", {"history": result.history, "looks": result.looks})
    for name, image in plots_of(result.history, result.looks).items():
        write_whole(context.directory / "report" / name, image.encode())


def forget_rollouts(directory: Path) -> None:
    """Remove a run's rollouts, which hold people's prompts, and the policies on its way."""
    shutil.rmtree(directory / ROLLOUTS, ignore_errors=True)
    for path in (directory / "adapters").glob("ppo-*"):
        shutil.rmtree(path, ignore_errors=True)


def unique_prompts(examples: Sequence[Example], *splits: Split) -> list[Ids]:
    """Return the prompts of parts of a dataset, of each cluster the first."""
    found: dict[str, Ids] = {}
    for split in splits:
        for example in examples:
            if example.split == split:
                found.setdefault(example.cluster, example.prompt)
    return list(found.values())


def prompts_of(context: RunContext, *, train: bool = True) -> Prompts:
    """Return the prompts that fit the served context, those to learn from where they are wanted.

    Raises:
        NotEnoughFeedback: none fits.
        InvalidConfig: the file of more prompts is not as it must be.
        StageFailed: the server does not answer.
    """
    settings = context.config.ppo
    asked = unique_prompts(context.examples, "train") if train else []
    validation = unique_prompts(context.examples, "validation")
    if len(validation) < _FEWEST_VALIDATION:
        validation = unique_prompts(context.examples, "validation", "calibration")
    try:
        with context.connect() as client:
            base = client.list_models().base
            room = base.context_tokens - settings.max_answer_tokens if base else 0
            if settings.prompts and train:
                more = _read_prompts(context.config)
                asked += [client.tokenize(messages).token_ids for messages in more]
    except heedful.HeedfulError as error:
        raise StageFailed(f"the server does not answer: {error}") from error
    fitting = [ids for ids in dict.fromkeys(asked) if len(ids) <= room]
    if left_out := len(set(asked)) - len(fitting):
        structlog.get_logger().info("prompts_too_long", left_out=left_out, room_tokens=room)
    if train and not fitting:
        raise NotEnoughFeedback(_METHOD, {"prompts": (0, 1)}, f"of at most {room} tokens")
    return Prompts(fitting, [ids for ids in validation if len(ids) <= room])


def require_prompts_readable(config: TrainerConfig) -> None:
    """Raise InvalidConfig where the file of more prompts is not there, or a line of it is bad."""
    if config.ppo.prompts:
        _read_prompts(config)


def _read_prompts(config: TrainerConfig) -> tuple[tuple[heedful.Message, ...], ...]:
    path = Path(config.ppo.prompts).expanduser()
    try:
        found = read_prompts(path)
    except OSError as error:
        why = f"{error.strerror}; the trainer must be able to read it on {socket.gethostname()}"
        raise InvalidConfig(f"trainer.ppo.prompts: {path}: {why}") from None
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise InvalidConfig(f"trainer.ppo.prompts: {path}: {found.problems[0]}{more}")
    return found.prompts


def server_source(context: RunContext) -> ServerSource:
    """Return the running server as a source of rollouts."""
    table = context.config.ppo.rollouts
    return ServerSource(
        lambda: async_client(context.config, context.run.scope.project),
        context.run.run_id,
        ServerSettings(table.concurrency, table.lease_s, table.timeout_s, table.patience_s),
    )


def _texts(context: RunContext, drawer: RolloutDrawer) -> list[Ids]:
    table = context.config.ppo.ptx
    if table.corpus:
        path = Path(table.corpus).expanduser()
        return corpus_texts(path, context.encoder, table.texts, table.max_tokens)

    def draw() -> list[Ids]:
        start = (start_token(context.base.directory),)
        count = -(-table.texts // _SAMPLES_OF_TEXT)
        plan = Plan("ptx-texts", "", (start,) * count, _SAMPLES_OF_TEXT, table.max_tokens, 0)
        drawn = drawer.take(plan, context.hooks)
        return [(*rollout.prompt, *rollout.answer) for rollout in drawn][: table.texts]

    name = context.base.identity.base_id
    return reference_texts(
        cache_path(context.place.home, name, table.texts, table.max_tokens), draw
    )


def _start(context: RunContext, texts: Sequence[Ids]) -> Mapping[str, Tensor] | None:
    """Return the adapter that PPO starts from; None for the base."""
    table = context.config.ppo.start
    if table.kind == "base":
        return None
    directory = context.adapter_dir(_START)
    if not _is_whole(directory):
        context.backbone.adapter.reset(context.config.run.seed)
        rows = mixed_rows(parts(context.examples)["train"], texts, table.text_share)
        if not rows:
            raise NotEnoughFeedback(
                _METHOD, {"demonstrations or corrections": (0, 1)}, "ppo.start.kind is sft"
            )
        parameters = context.backbone.adapter.parameters()
        train(
            RlInitObjective(context.scorer, parameters, rows),
            LoopSettings(
                epochs=table.epochs,
                seed=context.config.run.seed,
                optimiser=context.config.sft.optimiser.model_copy(
                    update={"learning_rate": table.learning_rate, "warmup_share": 0.0}
                ),
                checkpoint_s=context.config.run.checkpoint_s,
            ),
            context.checkpoints("ppo-start"),
            context.hooks,
            context.failpoints,
        )
        save_adapter(context, _START)
    return read_weights(directory)


def save_adapter(context: RunContext, name: str) -> None:
    """Seal what the backbone wears below the run's adapters; it may be there from before a kill."""
    if _is_whole(context.adapter_dir(name)):
        return
    try:
        temp = context.temp_adapter(name)
        context.backbone.adapter.save(temp, context.base.name)
        context.seal_adapter(name, temp, "policy", _METHOD)
    except OSError as error:
        raise StageFailed(f"a policy cannot be stored: {error}") from error


def _is_whole(directory: Path) -> bool:
    try:
        adapter_files.verify(directory)
    except (AdapterDamaged, OSError):
        return False
    return True

"""What `ppo.py` compares: the task, and our side of it."""

import argparse
import asyncio
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heedful
import torch
from heedful_store import Failpoints, Run, Scope, Store, adapter_files, uuid7
from heedful_trainer.backbone import Backbone, BackboneOptions, Batch, load_backbone
from heedful_trainer.base import Base, find_base
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.ppo.loop import PpoResult, Setup, train_ppo
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.plans import Planner
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.ppo.texts import PtxTexts, start_token
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Ids, Plan
from heedful_trainer.rollouts.server import ServerSettings, ServerSource
from heedful_trainer.rollouts.store import RolloutStore
from heedful_trainer.simulation.prompts import draw_prompts
from loop_support import LoopServer, say
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from brief_reward import reward_of_ids

RANK, ALPHA = 16, 32.0
SAMPLES = 2  # answers to each prompt
_TEXTS, TEXT_TOKENS, TEXTS_PER_EPISODE = 64, 96, 0.5
_TURN = "<|im_start|>"

Rewarded = list[tuple[Ids, float]]


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    base: Base
    tokenizer: Any
    args: argparse.Namespace
    prompts: list[Ids]
    held_out: list[Ids]

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer."""
        return int(self.args.answer)

    def reward(self, answer: Sequence[int]) -> float:
        """Return an answer's reward."""
        return reward_of_ids(answer, self._decode, self.tokenizer.eos_token_id)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def settings(self) -> PpoSettings:
        """Return ours: the trainer's defaults at this size, guards on length and end off."""
        args = self.args
        return PpoSettings.model_validate(
            {
                "iterations": args.episodes // args.batch,
                "batch_episodes": args.batch,
                "samples_per_prompt": SAMPLES,
                "minibatches": args.minibatches,
                "overlap": args.overlap,
                "max_answer_tokens": args.answer,
                "policy_learning_rate": args.learning_rate,
                "value_learning_rate": 2 * args.learning_rate,
                "warmup_iterations": 0,
                "kl": {"beta": args.beta, "target_nats": 0, "max_nats": 1e6},
                "ptx": {"texts_per_episode": TEXTS_PER_EPISODE},
                "reward": {"scale": "model", "missing_end_penalty": 0, "length_penalty": 0},
                "stopping": {"evaluate_every": 1000, "min_ended_share": 0},
            }
        )

    def peer_spec(self) -> dict[str, Any]:
        """Return the same for the peer; its prompts come as often as ours are answered."""
        args, turn = self.args, self.tokenizer.convert_tokens_to_ids(_TURN)
        first = self.prompts[0]
        last = len(first) - first[::-1].index(turn) - 1
        settings = self.settings()
        return {
            "model": str(self.base.directory),
            "threads": args.threads,
            "dtype": args.dtype,
            "rank": RANK,
            "alpha": ALPHA,
            "turn_token_id": turn,
            "num_turns": first.count(turn),
            "opening": len(first) - last,
            "prompts": [list(prompt) for prompt in self.prompts for _ in range(SAMPLES)],
            "batch": args.batch,
            "minibatches": args.minibatches,
            "episodes": args.episodes,
            "seed": args.seed,
            "answer_tokens": args.answer,
            "beta": args.beta,
            "clip": settings.clip,
            "lam": settings.lam,
            "policy_learning_rate": args.learning_rate,
            "peer_value_learning_rate": args.learning_rate / 10,
        }

    def shown(self) -> dict[str, Any]:
        """Return what a reader must know."""
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "model": self.base.name,
            "base_id": self.base.identity.base_id,
            "dtype": self.args.dtype,
            "episodes": self.args.episodes,
            "batch": self.args.batch,
            "minibatches": self.args.minibatches,
            "overlap": self.args.overlap,
            "prompt_tokens_mean": sum(lengths) / len(lengths),
            "answer_tokens_most": self.answer_tokens,
            "policy_learning_rate": self.args.learning_rate,
            "beta": self.args.beta,
            "lora_rank": RANK,
            "ptx_texts_per_episode": TEXTS_PER_EPISODE,
            "threads": self.args.threads,
            "reward": "brevity: 5 / (1 + words / 40)",
        }


class ByProgram(Networks):
    """Networks whose reward is the task's; the first rollouts are kept for the check."""

    def __init__(self, reward_model: RewardModel, seed: int, task: Task) -> None:
        super().__init__(reward_model, seed)
        self._task = task
        self.rewarded: Rewarded = []

    def rewards(self, batch: Batch) -> Tensor:
        """Return the answers' rewards, [A, 1]."""
        answers = torch.split(batch.packed.target_N, batch.packed.length_A.tolist())
        found = [self._task.reward(ids.tolist()) for ids in answers]
        if len(self.rewarded) < self._task.args.batch:
            self.rewarded += zip((tuple(ids.tolist()) for ids in answers), found, strict=True)
        return torch.tensor(found)[:, None]


def make_task(server: LoopServer, directory: Path, args: argparse.Namespace) -> Task:
    """Write the served weights for training, and the prompts as ids."""
    url = f"sqlite:///{server.home / 'heedful.db'}"
    run_dir = directory / "base"
    with Store(url) as store:
        config = TrainerConfig().model_copy(update={"target": server.target})
        place, scope = Place(server.home, url, "personal"), Scope("local")
        connect = functools.partial(heedful.Client, server.target)
        base = find_base(config, place, store, scope, run_dir, connect)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)

    def ids(prompt: str) -> Ids:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": False}
        return tuple(tokenizer.apply_chat_template(chat, **options))

    count = min(args.episodes // SAMPLES, 256)
    prompts = [ids(text) for text in draw_prompts("votes", count, args.seed)]
    held_out = [ids(text) for text in draw_prompts("evaluation", args.held_out, args.seed)]
    return Task(base, tokenizer, args, prompts, held_out)


def our_side(server: LoopServer, task: Task, directory: Path) -> dict[str, Any]:
    """Train by our loop against the running server; leave the policy in DIRECTORY/adapter."""
    args, settings, run_id = task.args, task.settings(), uuid7()
    with Store(f"sqlite:///{server.home / 'heedful.db'}") as rows:
        rows.create_run(Run(run_id=run_id, scope=Scope("local"), method="ppo_ptx")).result()
    options = BackboneOptions(args.dtype, RANK, ALPHA, 0.5, 1 << 30)
    backbone = load_backbone(task.base.directory, options)
    heads = Heads(1, backbone.hidden_size)  # of zeros: no value is known before
    backbone.adapter.reset(args.seed)
    networks = ByProgram(RewardModel(backbone, heads), args.seed, task)
    adapters = server.home / "runs" / run_id / "adapters"
    connect = functools.partial(heedful.AsyncClient, server.target)
    source = ServerSource(connect, run_id, ServerSettings(concurrency=args.batch))
    store = RolloutStore(directory / "rollouts", Failpoints())
    with RolloutDrawer(source, store, settings.rollouts.part_prompts) as drawer:
        started = time.perf_counter()
        texts = _texts(task, drawer)
        texts_s = time.perf_counter() - started
        setup = Setup(
            networks=networks,
            texts=PtxTexts(texts, backbone, args.seed, settings.micro_batch_tokens),
            drawer=drawer,
            planner=Planner(task.prompts, [], settings, args.seed),
            save_policy=lambda name: _seal(task, backbone, adapters / name, run_id),
            drop_policy=lambda name: None,
            checkpoints=CheckpointStore(directory / "checkpoints"),
            settings=settings,
            seed=args.seed,
            checkpoint_s=20.0,
        )
        say("ours begins")
        started = time.perf_counter()
        result = train_ppo(setup, NoHooks(), Failpoints())
        seconds = time.perf_counter() - started
    (directory / "adapter").mkdir(parents=True)
    backbone.adapter.save(directory / "adapter", task.base.name)
    shown = _shown(result, seconds)
    return {**shown, "ptx_texts_s": texts_s, "rewards": networks.rewarded} | _decode_rate(
        server, task
    )


def check_rewards(task: Task, rewarded: Rewarded) -> None:
    """Exit unless the rewards that training saw are those of the program."""
    for ids, seen in rewarded:
        if abs(task.reward(ids) - seen) > 1e-5:
            sys.exit(f"a reward is {seen}, and by the program {task.reward(ids)}: no figures")


def _texts(task: Task, drawer: RolloutDrawer) -> list[Ids]:
    start = (start_token(task.base.directory),)
    plan = Plan("ptx-texts", "", (start,) * (_TEXTS // 16), 16, TEXT_TOKENS, 0)
    return [(*r.prompt, *r.answer) for r in drawer.take(plan, NoHooks())]


def _seal(task: Task, backbone: Backbone, directory: Path, run_id: str) -> None:
    """Put what the backbone wears where the server finds a run's adapters."""
    if directory.exists():
        return
    temp = directory.with_name(f".{directory.name}")
    temp.mkdir(parents=True)
    backbone.adapter.save(temp, task.base.name)
    info = {
        "format": adapter_files.FORMAT,
        "role": "policy",
        "base_id": task.base.identity.base_id,
        "template_hash": task.base.identity.template_hash,
        "base_model": task.base.name,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.num_layers,
        "run_id": run_id,
        "method": "ppo_ptx",
    }
    (temp / adapter_files.INFO).write_text(json.dumps(info, sort_keys=True))
    (temp / "README.md").unlink(missing_ok=True)
    adapter_files.seal(temp)
    temp.rename(directory)


def _shown(result: PpoResult, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "episodes": result.episodes,
        "tokens": result.tokens,
        "ended": result.ended,
        "history": result.history,
    }


def _decode_rate(server: LoopServer, task: Task) -> dict[str, float]:
    """Return tokens a second of the same requests with nothing trained beside them."""

    async def draw() -> int:
        async with heedful.AsyncClient(server.target, timeout_s=600) as client:
            asked = [task.prompts[i % len(task.prompts)] for i in range(task.args.batch)]
            options = {"temperature": 1.0, "max_tokens": task.answer_tokens, "logprobs": True}
            answers = await asyncio.gather(
                *(client.generate(list(p), seed=i, **options) for i, p in enumerate(asked))
            )
        return sum(len(a.completions[0].token_ids) for a in answers)

    started = time.perf_counter()
    tokens = asyncio.run(draw())
    return {"decode_tokens_per_s": tokens / (time.perf_counter() - started)}

"""What the cases of benchmarks/reward_model.py share: sampled answers, labels and intervals.

Answers are drawn once, from a real server, and kept in a file on request. They are ordered by a
taste that a program states exactly (`heedful_trainer.simulation.tastes`), so that clean labels are
known; scores within the tie width of a simulated rater are no pair. The unit of every interval is
the prompt.
"""

import argparse
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import heedful
import numpy as np
from heedful_store import Failpoints, Scope, Store
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.base import Base, find_base
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.dataset.builders import Group, Order
from heedful_trainer.dataset.text import TextEncoder
from heedful_trainer.gate import Draw, ServerSampler
from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.packing import Row
from heedful_trainer.reward.training import RewardResult, train_reward
from heedful_trainer.simulation.prompts import draw_prompts, read_prompts
from heedful_trainer.simulation.tastes import Taste, score
from loop_support import LoopServer, say
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Ids = tuple[int, ...]
TIE_WIDTH = 0.02  # of a simulated rater
LEAST_ANSWERS, DIFFERENT_K = 4, 6  # K = 4 … 9
KWAY = 4
KTO_LEAST, KTO_DIFFERENT = 2, 3  # K = 2 … 4
_RESAMPLES = 2000


@dataclass(frozen=True)
class Sampled:
    """One answer of the base, drawn at T = 1 without truncation."""

    ids: Ids  # with the end token, where it ended
    text: str
    ended: bool


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers, no two of them the same."""

    prompt: Ids
    answers: tuple[Sampled, ...]

    @property
    def row(self) -> Row:
        """As the trainer computes it."""
        return Row(self.prompt, tuple(answer.ids for answer in self.answers))

    def first(self, count: int) -> "Sample":
        """Return the same with fewer answers."""
        return Sample(self.prompt, self.answers[:count])

    def scores(self, taste: Taste) -> list[float]:
        """Return how well each answer suits a taste."""
        return [score(taste, answer.text, answer.ended) for answer in self.answers]


@dataclass(frozen=True)
class Bench:
    """What every case is run with."""

    args: argparse.Namespace
    config: TrainerConfig
    base: Base
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    work: Path
    samples: Mapping[str, Sample]

    def pool(self, part: Literal["votes", "evaluation"], start: int, count: int) -> list[Sample]:
        """Return samples of the prompts of one part, in the order of the seed."""
        return [self.samples[text] for text in pool(part, self.args)[start : start + count]]

    def train_reward(
        self, name: str, parts: Mapping[str, Sequence[Group]], config: TrainerConfig
    ) -> RewardResult:
        """Train a reward model from scratch in the shared backbone."""
        stages = {"train": [], "validation": [], "calibration": [], **parts}
        return train_reward(
            self.backbone, stages, config, self.checkpoints(name), Progress(name), Failpoints()
        )

    def checkpoints(self, name: str) -> CheckpointStore:
        """Return an empty place for one training."""
        found = CheckpointStore(self.work / "checkpoints" / name)
        found.remove()
        return found


class Progress(NoHooks):
    """Says how far a training is, ten times."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, 0

    def report(self, fraction: float, figures: Mapping[str, float], step: int) -> None:
        """Write a line at each tenth."""
        if "loss" in figures and int(fraction * 10) > self._said:
            self._said = int(fraction * 10)
            shown = (
                f"loss {figures['loss']:.4g}, {figures.get('tokens_per_second', 0):.0f} tokens/s"
            )
            say(f"{self._name}: {fraction:.0%}, {shown}")


def pool(part: Literal["votes", "evaluation"], args: argparse.Namespace) -> tuple[str, ...]:
    """Return all prompts of one part, in the order of the seed."""
    return draw_prompts(part, len(read_prompts(part)), args.seed)


def make_base(server: LoopServer, args: argparse.Namespace) -> tuple[TrainerConfig, Base]:
    """Write the served weights for training, in the trainer's own way."""
    overrides = {"run.seed": args.seed, **dict(item.split("=", 1) for item in args.override)}
    config = with_overrides(TrainerConfig(target=server.target), overrides)
    url = f"sqlite:///{server.home / 'heedful.db'}"
    place = Place(server.home, url, "personal")
    connect = functools.partial(heedful.Client, server.target)
    with Store(url) as store:
        return config, find_base(
            config, place, store, Scope("local"), server.home / "base", connect
        )


def make_backbone(base: Base, config: TrainerConfig) -> Backbone:
    """Load the model as a run does."""
    lora = config.lora
    options = BackboneOptions(
        base.dtype, lora.rank, lora.alpha, lora.trained_share, lora.trunk_cache_bytes
    )
    return load_backbone(base.directory, options)


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template that is served."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.directory)
    return found


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Ids:
    """Return a conversation as the server renders it, up to where the answer begins."""
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    return tuple(tokenizer.apply_chat_template([dict(m) for m in messages], **options))


def wanted(cases: Sequence[str], args: argparse.Namespace) -> dict[str, int]:
    """Return how many answers each prompt needs for these cases."""
    votes, evaluation = pool("votes", args), pool("evaluation", args)
    found: dict[str, int] = {}

    def need(texts: Sequence[str], count: Callable[[int], int]) -> None:
        for place, text in enumerate(texts):
            found[text] = max(found.get(text, 0), count(place))

    if {"flipped", "calibration"} & set(cases):
        need(votes[: args.prompts + args.validation + args.calibration], many_answers)
        need(evaluation[: args.held_out], many_answers)
    if "kway" in cases:
        need(votes[: args.kway_prompts], lambda _: KWAY)
        need(evaluation[: args.kway_validation], lambda _: KWAY)
    if "kto" in cases:
        need(votes[: args.kto_prompts], few_answers)
        need(evaluation[: args.kto_held_out], lambda _: KWAY)
    if "mismatch" in cases:
        need(votes[: args.mismatch_prompts], lambda _: 1)
    return found


def many_answers(place: int) -> int:
    """Return K of a prompt, 4 to 9."""
    return LEAST_ANSWERS + place % DIFFERENT_K


def few_answers(place: int) -> int:
    """Return K of a prompt of thumbs, 2 to 4."""
    return KTO_LEAST + place % KTO_DIFFERENT


async def collect(
    server: LoopServer,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    args: argparse.Namespace,
) -> dict[str, Sample]:
    """Return the samples, drawing those that the file does not hold and adding them to it."""
    kept = _read_cache(args)
    missing = [text for text, count in counts.items() if len(kept.get(text, ())) < count]
    if missing:
        total = sum(counts[text] for text in missing)
        say(f"{total} answers to {len(missing)} prompts")
        kept |= await _draw(server, tokenizer, {text: counts[text] for text in missing}, args)
        _add_to_cache({text: kept[text] for text in missing}, args)
    found = {}
    for text, count in counts.items():
        prompt = chat_ids(tokenizer, [{"role": "user", "content": text}])
        different = {answer.ids: answer for answer in kept[text][:count]}
        found[text] = Sample(prompt, tuple(different.values()))
    return found


async def _draw(
    server: LoopServer,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    args: argparse.Namespace,
) -> dict[str, tuple[Sampled, ...]]:
    texts = [text for text, count in counts.items() for _ in range(count)]
    ids = {text: chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in counts}
    draw = Draw(1.0, args.max_tokens, 1_000_000 * (args.seed + 1))
    async with heedful.AsyncClient(server.target, timeout_s=3600) as client:
        rendered = (await client.tokenize([heedful.Message("user", texts[0])])).token_ids
        if tuple(rendered) != ids[texts[0]]:
            raise SystemExit("trainer and server render a prompt differently: no figure is printed")
        sampler = ServerSampler(client, SamplingSettings(timeout_s=3600))
        answers = iter(await sampler.answer("base", [list(ids[text]) for text in texts], draw))
    return {
        text: tuple(Sampled(a.token_ids, a.text, a.ended) for a in itertools.islice(answers, count))
        for text, count in counts.items()
    }


def _cache_key(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": Path(args.model).name, "max_tokens": args.max_tokens, "seed": args.seed}


def _read_cache(args: argparse.Namespace) -> dict[str, tuple[Sampled, ...]]:
    found: dict[str, tuple[Sampled, ...]] = {}
    if not args.cache or not args.cache.is_file():
        return found
    for line in args.cache.read_text().splitlines():
        item = json.loads(line)
        if item["of"] == _cache_key(args):
            found[item["prompt"]] = tuple(
                Sampled(tuple(a["ids"]), a["text"], a["ended"]) for a in item["answers"]
            )
    return found


def _add_to_cache(drawn: Mapping[str, Sequence[Sampled]], args: argparse.Namespace) -> None:
    if not args.cache:
        return
    with args.cache.open("a") as file:
        for text, answers in drawn.items():
            item = {"of": _cache_key(args), "prompt": text, "answers": [asdict(a) for a in answers]}
            file.write(json.dumps(item) + "\n")


def decided_pairs(scores: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield the pairs that a taste tells apart, the better one first."""
    for a, b in itertools.combinations(range(len(scores)), 2):
        if abs(scores[a] - scores[b]) > TIE_WIDTH:
            yield (a, b) if scores[a] > scores[b] else (b, a)


def labelled_group(sample: Sample, taste: Taste, flip: float, rng: random.Random) -> Group:
    """Return one row with every pair as a judgement of its own, flipped with some probability."""
    group = Group(sample.prompt)
    for answer in sample.answers:
        group.index(answer.ids)
    for better, worse in decided_pairs(sample.scores(taste)):
        flipped = rng.random() < flip
        first, second = (worse, better) if flipped else (better, worse)
        group.orders.append(Order((first, second), (0, 1), "comparison"))
    return group


def ratio_interval(right: Sequence[float], n: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of Σ right / Σ n, prompts drawn with replacement."""
    tops, bottoms = np.asarray(right, float), np.asarray(n, float)
    if len(tops) < 2:
        return 0.0, 1.0
    draws = np.random.default_rng(0).integers(0, len(tops), (_RESAMPLES, len(tops)))
    sums = bottoms[draws].sum(1)
    shares = tops[draws].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


@contextmanager
def timed(row: dict[str, Any], name: str) -> Iterator[None]:
    """Add the seconds that something took to a row."""
    began_s = time.monotonic()
    yield
    row.setdefault("seconds", {})[name] = round(time.monotonic() - began_s, 1)

"""A toy on which PPO-ptx can be taken apart in seconds: a random model and a taste that is known.

The model is a Llama of two layers with random weights; prompts are two random tokens. The true
taste of an answer is how many liked tokens it holds, of three. Raters compare answers of the
untrained model and some of their comparisons are flipped (one in seven, unless a sweep wants worse
raters); from them a reward model of five heads is trained, as in a refresh. What PPO climbs is that
reward model; what it was meant to climb is the taste, which training never sees. Language-model
loss is judged on text of the untrained model that training did not read. It says how the algorithm
behaves, and nothing about language.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from heedful_store import Failpoints
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.examples import Answer, Example, Split
from heedful_trainer.lora import read_weights
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import parts
from heedful_trainer.packing import Row
from heedful_trainer.ppo.loop import PpoResult, Setup, train_ppo
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.plans import Planner
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.ppo.texts import PtxTexts
from heedful_trainer.reward.model import load_reward_model
from heedful_trainer.reward.training import train_reward
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.local import LocalSource
from heedful_trainer.rollouts.records import Ids, Plan, Rollout
from heedful_trainer.rollouts.store import RolloutStore
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, EOS, START = 64, 63, 62
LIKED = frozenset(range(12))
MOST_LIKED, ANSWER_TOKENS, TEXT_TOKENS = 3, 8, 12
_OPTIONS = BackboneOptions("float32", 4, 8.0, 1.0, 1 << 26)
_SPLITS: tuple[Split, ...] = ("train",) * 8 + ("validation", "calibration")
_BASE: dict[str, Any] = {
    "iterations": 28,
    "batch_episodes": 32,
    "minibatches": 2,
    "max_answer_tokens": ANSWER_TOKENS,
    "policy_learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "warmup_iterations": 2,
    "overlap": False,
    "kl.beta": 0.02,
    "kl.target_nats": 0.0,
    "kl.max_nats": 1e6,
    "ptx.weight": "gamma",
    "ptx.gamma": 0.0,
    "ptx.texts_per_episode": 1.0,
    "reward.missing_end_penalty": 0.0,
    "reward.length_penalty": 0.0,
    "reward.limit": 1e6,
    "stopping.evaluate_every": 4,
    "stopping.prompts": 64,
    "stopping.patience": 1000,
    "stopping.min_ended_share": 0.0,
    "rollouts.part_prompts": 64,
}


def taste(answer: Sequence[int]) -> float:
    """Return how many liked tokens an answer holds, of three, 0 to 1."""
    return min(MOST_LIKED, sum(token in LIKED for token in answer)) / MOST_LIKED


@dataclass(frozen=True)
class Raters:
    """Who compared the answers: how often, how badly, and the seed of all that is by chance."""

    comparisons: int = 1600
    flipped: float = 1 / 7
    seed: int = 0  # of the answers compared, of the flips and of the reward model's training


@dataclass
class Toy:
    """The model, its reward model, its texts and its prompts; the same for every run."""

    directory: Path
    trained: Backbone
    sampler: Backbone
    prompts: list[Ids]
    validation: list[Ids]
    texts: list[Ids]
    held_out: list[Ids]
    reward_accuracy: float  # by the true taste, on comparisons that it did not learn from
    runs: int = 0

    def language_loss(self, *, with_adapter: bool) -> float:
        """Return the loss a token on the held-out texts."""
        rows = [Row(ids[:1], (ids[1:],)) for ids in self.held_out]
        with torch.no_grad():
            batch = self.trained.batch(rows, keep=False)
            hidden = self.trained.hidden(batch, with_adapter=with_adapter)
            found = self.trained.answer_logprobs(batch, hidden)
        return -float(found.mean())


@dataclass
class Watched:
    """A source that keeps what validation prompts were answered, by plan."""

    inner: LocalSource
    seen: dict[str, list[Rollout]] = field(default_factory=dict)

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        """Return the answers to a part of a plan."""
        found = await self.inner.draw(plan, start, prompts)
        if plan.name.startswith("look"):
            self.seen.setdefault(plan.name, []).extend(found)
        return found

    async def release(self, policy: str) -> None:
        """Nothing is held."""


@contextmanager
def toy(raters: Raters) -> Iterator[Toy]:
    """Yield the toy, its reward model trained; its files go afterwards."""
    torch.set_num_threads(1)
    # Rollouts are flushed to the disk before use, which takes longer than a toy's training.
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="heedful-toy-", dir=where) as temporary:
        directory = Path(temporary)
        _write_model(directory / "model")
        trained = load_backbone(directory / "model", _OPTIONS)
        sampler = load_backbone(directory / "model", _OPTIONS)
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(0, START, (128 + raters.comparisons, 2), generator=generator)
        asked = [tuple(ids) for ids in prompts.tolist()]
        made = Toy(
            directory,
            trained,
            sampler,
            asked[:64],
            asked[64:128],
            _draw(sampler, directory, "texts", [(START,)] * 256, 1, TEXT_TOKENS, whole=True),
            _draw(sampler, directory, "held-out", [(START,)] * 256, 1, TEXT_TOKENS, whole=True),
            0.0,
        )
        made.reward_accuracy = _train_reward(made, raters, asked[128:])
        yield made


def settings(changes: dict[str, Any]) -> PpoSettings:
    """Return the toy's settings with changes by dotted path."""
    overrides = {f"ppo.{path}": value for path, value in {**_BASE, **changes}.items()}
    return with_overrides(TrainerConfig(), overrides).ppo


def run(made: Toy, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train once; return where it ended and every look on the way."""
    config = settings(changes)
    made.runs += 1
    directory = made.directory / f"run-{made.runs}"
    adapters = directory / "adapters"
    source = Watched(LocalSource(made.sampler, adapters, EOS))
    store = RolloutStore(directory / "rollouts", Failpoints())

    def save(name: str) -> None:
        (adapters / name).mkdir(parents=True, exist_ok=True)
        made.trained.adapter.save(adapters / name, "toy")

    with RolloutDrawer(source, store, config.rollouts.part_prompts) as drawer:
        setup = Setup(
            networks=Networks(load_reward_model(made.trained, made.directory / "reward"), seed),
            texts=PtxTexts(made.texts, made.trained, seed, config.micro_batch_tokens),
            drawer=drawer,
            planner=Planner(made.prompts, made.validation, config, seed),
            save_policy=save,
            drop_policy=lambda name: None,
            checkpoints=CheckpointStore(directory / "checkpoints"),
            settings=config,
            seed=seed,
            checkpoint_s=1e9,
        )
        result = train_ppo(setup, NoHooks(), Failpoints())
    looks = _with_taste(result, source)
    made.trained.adapter.load(read_weights(adapters / f"ppo-average-{result.iterations:06d}"))
    rise = made.language_loss(with_adapter=True) - made.language_loss(with_adapter=False)
    return _figures(result, config, looks) | {"seed": seed, "lm_loss_rise": rise, "looks": looks}


def _with_taste(result: PpoResult, source: Watched) -> list[dict[str, float]]:
    found = []
    for look in result.looks:
        answers = source.seen[f"look-{int(look['iteration']):06d}"]
        mean = sum(taste(rollout.answer) for rollout in answers) / len(answers)
        found.append({**look, "true_taste": mean})
    return found


def _figures(
    result: PpoResult, config: PpoSettings, looks: Sequence[dict[str, float]]
) -> dict[str, Any]:
    learned = result.history[config.value_only_iterations :]
    chosen = {look["iteration"]: look["true_taste"] for look in looks}
    whole = result.ended == "iterations" and not result.skipped_steps
    return {
        "ended": result.ended,
        "stable": whole,
        "true_taste": looks[-1]["true_taste"],
        "true_taste_before": looks[0]["true_taste"],
        "true_taste_of_chosen": chosen[float(result.best_iteration)],
        "reward_single": looks[-1]["reward_single"],
        "reward_mean": looks[-1]["reward_mean"],
        "reward_min": looks[-1]["reward_min"],
        "kl_nats": looks[-1]["kl_nats"],
        "seconds": result.seconds,
        "ppo_norm": sum(row["ppo_norm"] for row in learned) / len(learned),
        "ptx_norm": sum(row["ptx_norm"] for row in learned) / len(learned),
    }


def _write_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=START,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def _draw(
    sampler: Backbone,
    directory: Path,
    name: str,
    prompts: Sequence[Ids],
    samples: int,
    max_tokens: int,
    *,
    seed: int = 0,
    whole: bool = False,
) -> Any:
    """Return what the untrained model wrote: whole texts, or rollouts."""
    source = LocalSource(sampler, directory, EOS)
    store = RolloutStore(directory / "drawn", Failpoints())
    with RolloutDrawer(source, store, len(prompts)) as drawer:
        plan = Plan(name, "", tuple(prompts), samples, max_tokens, seed)
        found = drawer.take(plan, NoHooks())
    return [(*item.prompt, *item.answer) for item in found] if whole else found


def _train_reward(made: Toy, raters: Raters, prompts: Sequence[Ids]) -> float:
    """Train and save the reward model; return its accuracy by the true taste."""
    groups = parts(_compared(made, raters, prompts))
    quick = {"learning_rate": 3e-3, "batch_size": 16, "min_steps": 0}
    changes: dict[str, Any] = {f"reward.optimiser.{key}": value for key, value in quick.items()}
    changes |= {"reward.epochs": 5.0, "reward.patience": 100, "run.seed": raters.seed}
    config = with_overrides(TrainerConfig(), changes)
    store = CheckpointStore(made.directory / "reward-checkpoints")
    result = train_reward(made.trained, groups, config, store, NoHooks(), Failpoints())
    (made.directory / "reward").mkdir()
    result.model.save(made.directory / "reward", "toy")
    return _accuracy(made, result.model)


def _compared(made: Toy, raters: Raters, prompts: Sequence[Ids]) -> list[Example]:
    """Return two answers to each prompt, ranked by the true taste, some of them the wrong way."""
    rollouts = _draw(
        made.sampler, made.directory, "compared", prompts, 2, ANSWER_TOKENS, seed=raters.seed
    )
    generator = torch.Generator().manual_seed(2 + raters.seed)
    examples = []
    for i, prompt in enumerate(prompts):
        first, second = (rollout.answer for rollout in rollouts[2 * i : 2 * i + 2])
        gain = taste(first) - taste(second)
        if float(torch.rand((), generator=generator)) < raters.flipped:
            gain = -gain
        examples.append(
            Example(
                seq=i + 1,
                kind="ranking",
                split=_SPLITS[i % len(_SPLITS)],
                cluster=str(i),
                prompt=prompt,
                answers=(Answer(first), Answer(second)),
                ranks=(int(gain < 0), int(gain > 0)),
            )
        )
    return examples


def _accuracy(made: Toy, model: Any) -> float:
    rollouts = _draw(made.sampler, made.directory, "unseen", made.validation, 16, ANSWER_TOKENS)
    right, count = 0.0, 0
    for i in range(0, len(rollouts), 2):
        first, second = rollouts[i].answer, rollouts[i + 1].answer
        gain = taste(first) - taste(second)
        if gain:
            reward_AE = model.score([Row(rollouts[i].prompt, (first, second))])
            right += float((reward_AE.mean(1)[0] - reward_AE.mean(1)[1]) * gain > 0)
            count += 1
    return right / count

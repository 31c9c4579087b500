"""Cases `flipped`, `calibration` and `kway` of benchmarks/reward_model.py: synthetic preferences.

One reward model, trained on pairs of which a share is flipped, serves the first two: how often it
orders unseen pairs as the taste does, and how far its probabilities can be believed. The third
trains on the same labels twice, once with all answers of a prompt in one row and once with each
pair in a row of its own, shuffled.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from heedful_trainer import calibration as c
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.builders import Group, Order
from heedful_trainer.methods.loop import LoopResult
from heedful_trainer.reward.model import RewardModel
from heedful_trainer.reward.training import RewardObjective, RewardResult
from heedful_trainer.simulation.raters import Reliability
from loop_support import say
from reward_samples import (
    KWAY,
    TIE_WIDTH,
    Bench,
    Sample,
    decided_pairs,
    labelled_group,
    ratio_interval,
    timed,
)

_ECE_RESAMPLES = 40


@dataclass(frozen=True)
class ScoredPair:
    """Two answers to one prompt: what the model and what the taste think of the difference."""

    prompt: int
    reward: float
    taste: float
    longer: int  # tokens of the first less those of the second

    @property
    def decided(self) -> bool:
        """Whether the taste tells them apart."""
        return abs(self.taste) > TIE_WIDTH

    @property
    def right(self) -> float:
        """Whether the model orders them as the taste does."""
        return 0.5 if self.reward == 0 else float((self.reward > 0) == (self.taste > 0))


@dataclass(frozen=True)
class Noisy:
    """A reward model that learned from flipped labels, and what it thinks of other prompts."""

    result: RewardResult
    calibration: tuple[ScoredPair, ...]
    held_out: tuple[ScoredPair, ...]
    row: dict[str, Any]


def train_noisy(bench: Bench) -> Noisy:
    """Train on flipped labels and score the pairs of prompts that training never saw."""
    args = bench.args
    rng = random.Random(f"{args.seed}:labels")
    bounds = {"train": args.prompts, "validation": args.validation, "calibration": args.calibration}
    parts, samples, start = {}, {}, 0
    for name, count in bounds.items():
        samples[name] = bench.pool("votes", start, count)
        parts[name] = [labelled_group(s, args.taste, args.flip, rng) for s in samples[name]]
        start += count
    held_out = bench.pool("evaluation", 0, args.held_out)
    row: dict[str, Any] = {"labels": _check_labels(samples["train"], parts["train"], bench)}
    bench.backbone.free_trunks()
    with timed(row, "training"):
        result = bench.train_reward("flipped", parts, bench.config)
    with timed(row, "scoring"):
        calibration = scored_pairs(result.model, samples["calibration"], bench)
        unseen = scored_pairs(result.model, held_out, bench)
    row |= {"training": training_json(result.loop), "temperature": result.model.heads.temperature}
    return Noisy(result, calibration, unseen, row)


def flipped(noisy: Noisy) -> dict[str, Any]:
    """Return how often clean labels of unseen prompts are predicted; the target is .90."""
    pairs = [pair for pair in noisy.held_out if pair.decided]
    right = sum(pair.right for pair in pairs)
    longer = sum(0.5 if p.longer == 0 else float((p.longer > 0) == (p.taste > 0)) for p in pairs)
    by_prompt = _by_prompt(pairs)
    interval = ratio_interval(
        [sum(p.right for p in group) for group in by_prompt], [len(group) for group in by_prompt]
    )
    return {
        **noisy.row,
        "accuracy": right / len(pairs),
        "interval": interval,
        "wilson_interval": c.wilson_interval(right, len(pairs)),
        "length_only_accuracy": max(longer, len(pairs) - longer) / len(pairs),
        "held_out_pairs": len(pairs),
        "held_out_prompts": len(by_prompt),
        "held_out_ties": len(noisy.held_out) - len(pairs),
        "target": "accuracy >= 0.90",
    }


def calibration(noisy: Noisy, flip: float, seed: int) -> dict[str, Any]:
    """Return the calibration error on unseen prompts; the target is .05, debiased.

    Twice: labels with the share of flips that was learned from, temperature as the trainer fitted
    it; and labels of a rater with Bradley and Terry's noise, temperature fitted on those.
    """
    rng = random.Random(f"{seed}:calibration")
    decided = [pair for pair in noisy.held_out if pair.decided]
    flips = [float((p.taste > 0) != (rng.random() < flip)) for p in decided]
    temperature = noisy.result.model.heads.temperature
    found: dict[str, Any] = {
        "flipped": {
            **_calibration_of(decided, flips, temperature),
            "calibration_pairs": noisy.result.calibration_pairs,
        }
    }
    noise = Reliability().noise
    fitted_on = _drawn(noisy.calibration, noise, rng)
    temperature = c.fit_temperature([p.reward for p in noisy.calibration], fitted_on)
    outcomes = _drawn(noisy.held_out, noise, rng)
    found["bradley_terry"] = {
        **_calibration_of(noisy.held_out, outcomes, temperature),
        "calibration_pairs": len(noisy.calibration),
        "noise": noise,
    }
    return {**found, "target": "debiased ECE <= 0.05 on >= 3000 pairs"}


def scored_pairs(
    model: RewardModel, samples: Sequence[Sample], bench: Bench
) -> tuple[ScoredPair, ...]:
    """Return all pairs of the samples, near ties too."""
    found = []
    for number, sample in enumerate(samples):
        rewards = model.score([sample.row]).mean(1).tolist()
        tastes = sample.scores(bench.args.taste)
        lengths = [len(answer.ids) for answer in sample.answers]
        for a, b in itertools.combinations(range(len(rewards)), 2):
            differences = rewards[a] - rewards[b], tastes[a] - tastes[b]
            found.append(ScoredPair(number, *differences, lengths[a] - lengths[b]))
    return tuple(found)


def kway(bench: Bench) -> dict[str, Any]:
    """Return cost and validation loss of K-way rows beside shuffled pairs, pair visits equal."""
    args = bench.args
    rng = random.Random(f"{args.seed}:kway")
    groups = _kway_groups(bench.pool("votes", 0, args.kway_prompts), bench, rng)
    validation = _kway_groups(bench.pool("evaluation", 0, args.kway_validation), bench, rng)
    pairs = sum(len(group.orders) for group in groups)
    # The same pairs in a step and the same number of steps, as near as rows allow.
    in_step = round(args.kway_batch * pairs / len(groups))
    row: dict[str, Any] = {"pairs": pairs, "prompts": len(groups), "epochs": args.kway_epochs}
    row["batch_size"] = args.kway_batch
    losses = {}
    for name, train, batch_size in (
        ("kway", groups, args.kway_batch),
        ("shuffled", _split(groups), in_step),
    ):
        bench.backbone.free_trunks()
        config = _one_look(bench, batch_size)
        with timed(row, name):
            result = bench.train_reward(name, {"train": train, "validation": validation}, config)
        losses[name] = _validation_losses(result, validation, bench)
        row[name] = {**_forwards(train), "batch_size": batch_size} | {
            "validation_loss": float(np.mean(losses[name])),
            "training": training_json(result.loop),
        }
    difference = np.subtract(losses["kway"], losses["shuffled"])
    row["difference"] = float(difference.mean())
    row["interval"] = ratio_interval(difference.tolist(), [1.0] * len(difference))
    row["target"] = "at most K forwards a prompt; validation loss <= shuffled pairs"
    return row


def training_json(loop: LoopResult) -> dict[str, Any]:
    """Return how a training went."""
    return {
        "steps": loop.steps,
        "ended": loop.ended,
        "seconds": round(loop.seconds, 1),
        "tokens_per_second": round(loop.tokens / max(loop.seconds, 1e-9)),
        "history": loop.history,
    }


def _check_labels(
    samples: Sequence[Sample], groups: Sequence[Group], bench: Bench
) -> dict[str, Any]:
    """Exit unless clean labels are the taste's and as many are flipped as was asked for."""
    taste, flip = bench.args.taste, bench.args.flip
    flips, pairs = 0, 0
    for sample, group in zip(samples, groups, strict=True):
        scores = sample.scores(taste)
        clean = set(decided_pairs(scores))
        said = [order.answers for order in group.orders]
        both = set(said) | {(b, a) for a, b in said}
        if not clean <= both or any(scores[a] <= scores[b] for a, b in clean):
            raise SystemExit("the labels are not the taste's: no figure is printed")
        flips += sum(pair not in clean for pair in said)
        pairs += len(said)
    if pairs == 0 or abs(flips - flip * pairs) > 5 * math.sqrt(pairs * flip * (1 - flip)) + 1:
        raise SystemExit(f"{flips} of {pairs} labels are flipped: no figure is printed")
    say(f"{pairs} training pairs, {flips / pairs:.1%} flipped")
    prompts = sum(bool(group.orders) for group in groups)
    return {"pairs": pairs, "flipped_share": flips / pairs, "prompts_with_pairs": prompts}


def _drawn(pairs: Sequence[ScoredPair], noise: float, rng: random.Random) -> list[float]:
    return [float(rng.random() < 1 / (1 + math.exp(-pair.taste / noise))) for pair in pairs]


def _calibration_of(
    pairs: Sequence[ScoredPair], outcomes: Sequence[float], temperature: float
) -> dict[str, Any]:
    differences = [pair.reward for pair in pairs]
    found: dict[str, Any] = {"n": len(pairs), "temperature": temperature}
    for name, scale in (("before", 1.0), ("after", temperature)):
        p = c.probabilities(differences, scale)
        found[f"ece_{name}"] = c.expected_calibration_error(p, outcomes)
        found[f"debiased_ece_{name}"] = c.debiased_calibration_error(p, outcomes)
    p = c.probabilities(differences, temperature)
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.prompt, []).append(place)
    rng, errors = np.random.default_rng(0), []
    for _ in range(_ECE_RESAMPLES):
        drawn = rng.choice(list(places), len(places))
        chosen = [place for prompt in drawn for place in places[int(prompt)]]
        again = [p[i] for i in chosen], [outcomes[i] for i in chosen]
        errors.append(c.debiased_calibration_error(*again))
    # Resampling adds noise of its own, which the correction does not know: it leans upwards.
    found["interval"] = tuple(float(v) for v in np.quantile(errors, (0.025, 0.975)))
    return found


def _by_prompt(pairs: Sequence[ScoredPair]) -> list[list[ScoredPair]]:
    found: dict[int, list[ScoredPair]] = {}
    for pair in pairs:
        found.setdefault(pair.prompt, []).append(pair)
    return list(found.values())


def _kway_groups(samples: Sequence[Sample], bench: Bench, rng: random.Random) -> list[Group]:
    args = bench.args
    groups = [labelled_group(s.first(KWAY), args.taste, args.flip, rng) for s in samples]
    return [group for group in groups if group.orders]


def _one_look(bench: Bench, batch_size: int) -> TrainerConfig:
    """Return a configuration whose number of steps follows from data and epochs alone."""
    overrides = {
        "reward.optimiser.batch_size": batch_size,
        "reward.optimiser.min_steps": 0,
        "reward.epochs": bench.args.kway_epochs,
        "reward.evaluations": 1,
    }
    return with_overrides(bench.config, overrides)


def _split(groups: Sequence[Group]) -> list[Group]:
    """Return every pair as a row of its own."""
    found = []
    for group in groups:
        answers = list(group.answers)
        for order in group.orders:
            alone = Group(group.prompt)
            indices = tuple(alone.index(answers[answer]) for answer in order.answers)
            alone.orders.append(Order(indices, order.ranks, order.source))
            found.append(alone)
    return found


def _forwards(groups: Sequence[Group]) -> dict[str, Any]:
    """Return what one pass over the data computes."""
    rows = [group.row for group in groups]
    return {
        "rows": len(rows),
        "answer_forwards": sum(len(row.answers) for row in rows),
        "answer_tokens": sum(len(answer) for row in rows for answer in row.answers),
        "tokens": sum(row.num_tokens for row in rows),
    }


def _validation_losses(
    result: RewardResult, validation: Sequence[Group], bench: Bench
) -> list[float]:
    """Return each prompt's mean loss over its pairs, without the pull of rewards to 0."""
    settings = bench.config.reward.model_copy(update={"centre_weight": 0.0})
    seed = bench.config.run.seed
    return [
        RewardObjective(result.model, settings, [group], [group], seed).evaluate()["loss"]
        for group in validation
    ]

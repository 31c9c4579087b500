"""Training a policy: which method the data allows, its objective, its training and its report.

Owns the choice ``auto``, the least that each method needs, and the evidence about the result on
answers that were held out. It knows neither store nor runs. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from heedful_store import Failpoints

from heedful_trainer.backbone import Backbone
from heedful_trainer.calibration import spearman, wilson_interval
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import Method, OptimiserSettings, TrainerConfig
from heedful_trainer.dataset.builders import Group, Pair, counts, group_by_prompt, pairs_of
from heedful_trainer.dataset.examples import Example
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.dpo import DpoObjective, pair_scores
from heedful_trainer.methods.dropout import residual_dropout
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.methods.kto import KtoObjective
from heedful_trainer.methods.loop import LoopResult, LoopSettings, train
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.methods.sft import SftObjective
from heedful_trainer.reward.training import require_judgements

Chosen = Literal["sft", "dpo", "kto", "ppo_ptx"]
Offline = Literal["sft", "dpo", "kto"]  # learn from the dataset alone
PolicyObjective = SftObjective | DpoObjective | KtoObjective

_DIVERGENCE_ROWS = 48  # each is computed twice, by whole distributions


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A held-out pair with its log-probs, as the gate takes it; "first" is the preferred one."""

    prompt: tuple[int, ...]
    rater: str
    first_policy: float
    first_reference: float
    second_policy: float
    second_reference: float
    source: str
    length_difference: int  # tokens of the first less those of the second


def choose_method(groups: Sequence[Group], config: TrainerConfig) -> Chosen:
    """Return the method for the training part: the one asked for, or what the data allows.

    Raises:
        NotEnoughFeedback: below the least that the method needs; says what is missing.
    """
    there = counts(groups)
    written = there["corrections"] + there["demonstrations"]
    if config.method != "auto":
        require_enough(config.method, groups, config)
        return config.method
    if there["pairs"] >= config.dpo.min_pairs:
        return "dpo"
    enough_thumbs = there["thumbs"] >= config.kto.min_thumbs
    if enough_thumbs and min(there["thumbs_up"], there["thumbs_down"]) >= config.kto.min_of_each:
        return "kto"
    if written >= config.sft.min_examples:
        return "sft"
    raise NotEnoughFeedback(
        "any method",
        {
            "decided pairs": (there["pairs"], config.dpo.min_pairs),
            "thumbs": (there["thumbs"], config.kto.min_thumbs),
            "corrections or demonstrations": (written, config.sft.min_examples),
        },
        "one of these is needed; ties alone say nothing about what is better"
        if there["ties"]
        else "one of these is needed",
    )


def require_enough(method: Method, groups: Sequence[Group], config: TrainerConfig) -> None:
    """Raise NotEnoughFeedback unless the training part holds what the method needs."""
    there = counts(groups)
    if method == "dpo":
        needs = {"decided pairs": (there["pairs"], config.dpo.min_pairs)}
    elif method == "kto":
        ups = there["thumbs_up"] + there["pairs"] + there["corrections"]
        downs = there["thumbs_down"] + there["pairs"] + there["all_bad"] + there["corrections"]
        needs = {
            "judged answers": (ups + downs, config.kto.min_thumbs),
            "liked ones": (ups, config.kto.min_of_each),
            "disliked ones": (downs, config.kto.min_of_each),
        }
    elif method == "ppo_ptx":
        require_judgements(groups)
        return
    else:
        written = there["corrections"] + there["demonstrations"]
        needs = {"corrections or demonstrations": (written, config.sft.min_examples)}
    if missing := {kind: pair for kind, pair in needs.items() if pair[0] < pair[1]}:
        raise NotEnoughFeedback(method, missing)


def train_policy(
    backbone: Backbone,
    scorer: PolicyScorer,
    examples: Sequence[Example],
    method: Offline,
    config: TrainerConfig,
    checkpoints: CheckpointStore,
    hooks: Hooks,
    failpoints: Failpoints,
) -> LoopResult:
    """Train the backbone's adapter from the base; it holds the policy afterwards.

    Raises:
        TrainingFailed, RunStopped: of the loop.
    """
    backbone.adapter.reset(config.run.seed)
    objective = _objective(backbone, scorer, examples, method, config)
    scorer.prepare(objective.rows, hooks)
    epochs, optimiser = _schedule(method, config)
    settings = LoopSettings(
        epochs=epochs,
        seed=config.run.seed,
        optimiser=optimiser,
        checkpoint_s=config.run.checkpoint_s,
        compute_cap_s=config.run.compute_cap_s,
    )
    dropout = config.sft.residual_dropout if method == "sft" else 0.0
    with residual_dropout(backbone, dropout, config.run.seed):
        return train(objective, settings, checkpoints, hooks, failpoints)


def judge_pairs(
    scorer: PolicyScorer, groups: Sequence[Group], config: TrainerConfig
) -> list[JudgedPair]:
    """Return the log-probs of decided held-out pairs under the trained policy and the reference."""
    found = []
    everything = config.dpo.model_copy(update={"tie_weight": 0.0, "correction_weight": 1.0})
    with torch.no_grad():
        for group in groups:
            pairs = pairs_of(group, everything)
            if not pairs:
                continue
            policy, reference = scorer.policy([group.row]), scorer.reference([group.row])
            scores = pair_scores(policy, reference, pairs, length_normalised=False)
            lengths = policy.length_A
            sources = _sources(group, pairs)
            for i, pair in enumerate(pairs):
                found.append(
                    JudgedPair(
                        prompt=group.prompt,
                        rater=group.raters[0] if group.raters else "",
                        first_policy=float(scores.first_P[i]),
                        first_reference=float(scores.reference_first_P[i]),
                        second_policy=float(scores.second_P[i]),
                        second_reference=float(scores.reference_second_P[i]),
                        source=sources[i],
                        length_difference=int(lengths[pair.first] - lengths[pair.second]),
                    )
                )
    return found


def report_on_policy(
    scorer: PolicyScorer, held_out: Sequence[Group], pairs: Sequence[JudgedPair]
) -> dict[str, Any]:
    """Return the evidence about a policy on answers that it never saw.

    Accuracy of the implicit reward with its interval, its correlation with length (a policy that
    only learned "longer" shows here), and the exact divergence from the reference.
    """
    margins = [
        pair.first_policy - pair.first_reference - pair.second_policy + pair.second_reference
        for pair in pairs
    ]
    lengths = [float(pair.length_difference) for pair in pairs]
    right = sum((m > 0) + 0.5 * (m == 0) for m in margins)
    divergence = scorer.divergence([group.row for group in held_out[:_DIVERGENCE_ROWS]])
    return {
        "pairs": len(pairs),
        "accuracy": right / len(pairs) if pairs else None,
        "accuracy_interval": list(wilson_interval(right, len(pairs))),
        "mean_margin_nats": sum(margins) / len(margins) if margins else None,
        "length_correlation": spearman(margins, lengths) if pairs else None,
        "length_only_accuracy": _length_only(lengths),
        "kl_nats": float(divergence.mean()) if divergence.numel() else None,
        "kl_answers": int(divergence.numel()),
    }


def parts(examples: Sequence[Example]) -> Mapping[str, list[Group]]:
    """Return every part of a dataset by prompt."""
    return {
        "train": group_by_prompt(examples, "train"),
        "validation": group_by_prompt(examples, "validation"),
        "calibration": group_by_prompt(examples, "calibration"),
        "gate": group_by_prompt(examples, "gate"),
    }


def _objective(
    backbone: Backbone,
    scorer: PolicyScorer,
    examples: Sequence[Example],
    method: Offline,
    config: TrainerConfig,
) -> PolicyObjective:
    parameters = backbone.adapter.parameters()
    learned = group_by_prompt(examples, "train")
    validation = group_by_prompt(examples, "validation")
    if method == "dpo":
        return DpoObjective(scorer, parameters, config.dpo, learned, validation)
    if method == "kto":
        return KtoObjective(
            scorer,
            parameters,
            config.kto,
            learned,
            validation,
            with_orders=config.method == "kto",
        )
    return SftObjective(scorer, parameters, learned, validation)


def _schedule(method: Offline, config: TrainerConfig) -> tuple[float, OptimiserSettings]:
    match method:
        case "sft":
            return config.sft.epochs, config.sft.optimiser
        case "dpo":
            return config.dpo.epochs, config.dpo.optimiser
        case "kto":
            return config.kto.epochs, config.kto.optimiser


def _sources(group: Group, pairs: Sequence[Pair]) -> list[str]:
    corrected = {(item.corrected, item.served) for item in group.corrections}
    return [
        "correction" if (pair.first, pair.second) in corrected else "comparison" for pair in pairs
    ]


def _length_only(differences: Sequence[float]) -> float | None:
    """Return the accuracy of the better of "longer is better" and "shorter is better"."""
    if not differences:
        return None
    longer = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    return max(longer, 1 - longer)

"""The stages that learn: snapshot, reward, policy.

Owns what each leaves in the run's directory and what it reports as evidence. Each can be done again
after a kill and ends the same. Training thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from heedful_trainer.dataset import builders, snapshot
from heedful_trainer.dataset.builders import Group
from heedful_trainer.dataset.examples import SPLITS
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.loop import LoopResult
from heedful_trainer.methods.policy import (
    Chosen,
    choose_method,
    judge_pairs,
    parts,
    report_on_policy,
    train_policy,
)
from heedful_trainer.ppo.report import ppo_evidence
from heedful_trainer.reward.report import report_on_reward
from heedful_trainer.reward.training import train_reward
from heedful_trainer.runs.context import DATASET, RunContext, write_whole
from heedful_trainer.runs.ppo_policy import (
    require_prompts_readable,
    train_by_ppo,
    write_ppo_report,
)
from heedful_trainer.runs.sft_policy import train_sft_by_reward

PAIRS = "pairs.json"


def take_snapshot(context: RunContext) -> Mapping[str, Any]:
    """Write the dataset and record every event that was read.

    Raises:
        NotEnoughFeedback: no method can learn from it; found out before anything is trained.
        InvalidConfig: likewise, a file that a later stage will read is not as it must be.
    """
    require_prompts_readable(context.config)
    found = snapshot.take(
        context.store.judged_feedback(context.run.scope, context.place.profile),
        base=context.base.identity,
        profile=context.place.profile,
        settings=context.config.dataset,
        encoder=context.encoder,
    )
    lines = found.lines()
    write_whole(context.directory / DATASET, lines)
    ack = context.store.put_run_inputs(
        context.run.run_id, context.run.lease_owner or "", list(found.inputs)
    )
    ack.result()
    dataset_id = snapshot.dataset_id(lines)
    context.lease.update(dataset_id=dataset_id, from_log_seq=0, to_log_seq=found.to_log_seq)
    groups = parts(found.examples)
    method = choose_method(groups["train"], context.config)
    excluded = Counter(row.reason for row in found.inputs if row.split == "excluded")
    return {
        "dataset_id": dataset_id,
        "events": len(found.inputs),
        "split_by": found.split_by,
        "parts": {split: sum(e.split == split for e in found.examples) for split in SPLITS},
        "kinds": dict(Counter(example.kind for example in found.examples)),
        "train": dict(builders.counts(groups["train"])),
        "raters": len({example.rater for example in found.examples}),
        "excluded": {str(reason): count for reason, count in excluded.items()},
        "method": method,
        "base_model": context.base.name,
        "base_id": context.base.identity.base_id,
    }


def train_reward_model(context: RunContext) -> Mapping[str, Any]:
    """Train, save and report on the reward model; too little to learn from skips it."""
    if not context.config.reward.enabled:
        return {"skipped": "turned off (reward.enabled)"}
    groups = parts(context.examples)
    try:
        result = train_reward(
            context.backbone,
            groups,
            context.config,
            context.checkpoints("reward"),
            context.hooks,
            context.failpoints,
        )
    except NotEnoughFeedback as error:
        return {"skipped": str(error)}
    temp = context.temp_adapter("reward")
    result.model.save(temp, context.base.name)
    report = report_on_reward(
        result.model, unbiased=[*groups["gate"], *groups["calibration"]], unseen=groups["gate"]
    )
    return {
        "content_hash": context.seal_adapter("reward", temp, "reward", "reward"),
        "training": _loop(result.loop),
        "ties_log_nu": result.log_nu,
        "calibration_pairs": result.calibration_pairs,
        "report": report,
    }


def train_the_policy(context: RunContext) -> Mapping[str, Any]:
    """Train, save and report on the policy."""
    groups = parts(context.examples)
    method = choose_method(groups["train"], context.config)
    context.lease.update(method=method)
    training = _trained(context, method)
    temp = context.temp_adapter("policy")
    context.backbone.adapter.save(temp, context.base.name)
    held_out = _held_out(groups)
    pairs = judge_pairs(context.scorer, held_out, context.config)
    context.write_json(PAIRS, [asdict(pair) for pair in pairs])
    return {
        "method": method,
        "content_hash": context.seal_adapter("policy", temp, "policy", method),
        "training": training,
        "report": report_on_policy(context.scorer, held_out, pairs),
    }


def _trained(context: RunContext, method: Chosen) -> dict[str, Any]:
    """Train by a method and return how it went; the backbone wears the policy afterwards."""
    if method == "ppo_ptx":
        result = train_by_ppo(context)
        write_ppo_report(context, result)
        return ppo_evidence(result)
    if method == "sft" and context.config.sft.choose_by == "reward":
        return _loop(train_sft_by_reward(context))
    return _loop(
        train_policy(
            context.backbone,
            context.scorer,
            context.examples,
            method,
            context.config,
            context.checkpoints("policy"),
            context.hooks,
            context.failpoints,
        )
    )


def _held_out(groups: Mapping[str, list[Group]]) -> list[Group]:
    """Return what no policy learned from: its training reads the training part alone."""
    return [*groups["gate"], *groups["calibration"], *groups["validation"]]


def _loop(result: LoopResult) -> dict[str, Any]:
    rate = result.tokens / result.seconds if result.seconds else None
    return {
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "seconds": round(result.seconds, 2),
        "tokens": result.tokens,
        "tokens_per_second": rate,
        "ended": result.ended,
        "history": result.history[-20:],
    }

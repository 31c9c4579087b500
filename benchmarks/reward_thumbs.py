"""Case `kto` of benchmarks/reward_model.py: thumbs alone beside pairs of the same answers.

Each answer gets a thumb, up where it suits the taste better than the middle one of the training
answers. KTO learns from the thumbs, DPO from every pair of an answer that is liked and one that is
not, to the same prompt. Both are judged by the margin of their implicit reward on such pairs of
prompts that neither saw. A prompt whose answers are all liked, or none, says nothing to DPO.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from heedful_store import Failpoints
from heedful_trainer.dataset.builders import Group, Order
from heedful_trainer.dataset.examples import Answer, Example
from heedful_trainer.methods.policy import JudgedPair, judge_pairs, train_policy
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.simulation.tastes import Taste
from reward_cases import training_json
from reward_samples import (
    KWAY,
    Bench,
    Ids,
    Progress,
    Sample,
    few_answers,
    ratio_interval,
    timed,
)

_UNTRAINED_NATS = 1e-3


def kto(bench: Bench) -> dict[str, Any]:
    """Return the accuracy of both on unseen prompts; the target is a difference of 2 points."""
    args = bench.args
    train = [
        sample.first(few_answers(place))
        for place, sample in enumerate(bench.pool("votes", 0, args.kto_prompts))
    ]
    threshold = statistics.median(s for sample in train for s in sample.scores(args.taste))
    thumbs = _thumbs(train, args.taste, threshold)
    pairs = _pairs(train, args.taste, threshold)
    unseen = [sample.first(KWAY) for sample in bench.pool("evaluation", 0, args.kto_held_out)]
    held_out = _held_out(unseen, args.taste, threshold)
    bench.backbone.free_trunks()
    scorer = PolicyScorer(bench.backbone, bench.encoder.eos_token_id)
    _check_untrained(bench, scorer, held_out)
    row: dict[str, Any] = {
        "thumbs": len(thumbs),
        "thumbs_up": sum(bool(example.up) for example in thumbs),
        "prompts": len(train),
        "dpo_pairs": len(pairs),
        "dpo_prompts": len({example.prompt for example in pairs}),
        "threshold": threshold,
        "held_out_prompts": len(held_out),
        "held_out_pairs": sum(len(group.orders) for group in held_out),
    }
    accuracies: dict[str, dict[Ids, list[float]]] = {}
    for method, examples in (("kto", thumbs), ("dpo", pairs)):
        with timed(row, method):
            row[method], accuracies[method] = _train(bench, scorer, method, examples, held_out)
    return row | _difference(accuracies)


def _train(
    bench: Bench,
    scorer: PolicyScorer,
    method: str,
    examples: Sequence[Example],
    held_out: Sequence[Group],
) -> tuple[dict[str, Any], dict[Ids, list[float]]]:
    """Train one policy from the base and return its figures, and what it got right by prompt."""
    loop = train_policy(
        bench.backbone,
        scorer,
        examples,
        "kto" if method == "kto" else "dpo",
        bench.config,
        bench.checkpoints(method),
        Progress(method),
        Failpoints(),
    )
    judged = judge_pairs(scorer, held_out, bench.config)
    right: dict[Ids, list[float]] = {}
    for pair in judged:
        margin = _margin(pair)
        right.setdefault(pair.prompt, []).append(0.5 if margin == 0 else float(margin > 0))
    sums, n = [sum(v) for v in right.values()], [len(v) for v in right.values()]
    return {
        "accuracy": sum(sums) / sum(n),
        "interval": ratio_interval(sums, n),
        "mean_margin_nats": statistics.fmean(map(_margin, judged)),
        "training": training_json(loop),
    }, right


def _difference(accuracies: dict[str, dict[Ids, list[float]]]) -> dict[str, Any]:
    """Return KTO's accuracy less DPO's, with its interval over prompts."""
    kto, dpo = accuracies["kto"], accuracies["dpo"]
    differences = [sum(kto[prompt]) - sum(dpo[prompt]) for prompt in kto]
    n = [len(kto[prompt]) for prompt in kto]
    return {
        "difference": sum(differences) / sum(n),
        "interval": ratio_interval(differences, n),
        "target": "KTO within 2 points of DPO",
    }


def _thumbs(samples: Sequence[Sample], taste: Taste, threshold: float) -> list[Example]:
    found = []
    for sample in samples:
        for answer, score in zip(sample.answers, sample.scores(taste), strict=True):
            found.append(
                Example(
                    seq=len(found),
                    kind="thumb",
                    split="train",
                    cluster=str(hash(sample.prompt)),
                    prompt=sample.prompt,
                    answers=(Answer(answer.ids),),
                    up=score > threshold,
                )
            )
    return found


def _pairs(samples: Sequence[Sample], taste: Taste, threshold: float) -> list[Example]:
    found = []
    for sample in samples:
        for up, down in _up_and_down(sample, taste, threshold):
            answers = Answer(sample.answers[up].ids), Answer(sample.answers[down].ids)
            found.append(
                Example(
                    seq=len(found),
                    kind="ranking",
                    split="train",
                    cluster=str(hash(sample.prompt)),
                    prompt=sample.prompt,
                    answers=answers,
                    ranks=(0, 1),
                    source="comparison",
                )
            )
    return found


def _held_out(samples: Sequence[Sample], taste: Taste, threshold: float) -> list[Group]:
    found = []
    for sample in samples:
        group = Group(sample.prompt)
        for answer in sample.answers:
            group.index(answer.ids)
        for pair in _up_and_down(sample, taste, threshold):
            group.orders.append(Order(pair, (0, 1), "comparison"))
        if group.orders:
            found.append(group)
    return found


def _up_and_down(sample: Sample, taste: Taste, threshold: float) -> list[tuple[int, int]]:
    ups = [score > threshold for score in sample.scores(taste)]
    return [
        (a, b) for a, b in itertools.product(range(len(ups)), repeat=2) if ups[a] and not ups[b]
    ]


def _margin(pair: JudgedPair) -> float:
    first = pair.first_policy - pair.first_reference
    return first - pair.second_policy + pair.second_reference


def _check_untrained(bench: Bench, scorer: PolicyScorer, held_out: Sequence[Group]) -> None:
    """Exit unless an untrained policy is the reference."""
    bench.backbone.adapter.reset(bench.config.run.seed)
    margins = [_margin(pair) for pair in judge_pairs(scorer, held_out[:2], bench.config)]
    if not margins or max(map(abs, margins)) > _UNTRAINED_NATS:
        raise SystemExit(f"untrained margins are {margins}: no figure is printed")

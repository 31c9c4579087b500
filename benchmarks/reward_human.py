"""Case `human` of benchmarks/reward_model.py: real people's preferences, by cross-validation.

Reads pairs of HH (helpful), comparisons of FineGrainedRLHF (four answers to a question; its
passages are left out, they would not fit) and ranked replies of OpenAssistant. Prompts that are the
same but for case, punctuation and numbers are kept once, over all sets; prompts that begin alike
are in one fold. One model a fold learns from all sets; every pair is judged by the model that did
not see its prompt. Beside it stands "the longer one" (or the shorter, whichever is right more
often), by whole answers, before they are cut.
"""

import gzip
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful_trainer.calibration import wilson_interval
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.builders import Group, Order
from heedful_trainer.dataset.splits import cluster_of
from heedful_trainer.reward.model import RewardModel
from loop_support import say
from reward_cases import training_json
from reward_samples import Bench, chat_ids, ratio_interval, timed

Messages = list[dict[str, str]]
_VALIDATION_SHARE = 0.1  # of the prompts that a fold learns from
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Judged:
    """A conversation, the answers to its last turn, and which one people preferred."""

    source: str
    messages: Messages
    answers: tuple[str, ...]
    orders: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # answers and their ranks

    @property
    def root(self) -> str:
        """Conversations that begin alike share it."""
        return cluster_of("", self.messages[0]["content"])


@dataclass(frozen=True)
class Prepared:
    """The same as the trainer computes it."""

    judged: Judged
    group: Group
    lengths: dict[int, int]  # tokens of whole answers, by index in the row


@dataclass(frozen=True)
class Found:
    """What was right about one prompt."""

    source: str
    pairs: int
    right: float
    longer: float  # pairs whose longer answer was preferred


def human(bench: Bench) -> dict[str, Any]:
    """Return accuracy by set and pooled; the target is to beat length, the aim .62."""
    args = bench.args
    prepared = [_prepare(item, bench) for item in _chosen(args.human, args)]
    prepared = [item for item in prepared if item.group.orders]
    roots = sorted({item.judged.root for item in prepared})
    random.Random(args.seed).shuffle(roots)
    folds = [set(roots[fold :: args.folds]) for fold in range(args.folds)]
    overrides = {} if args.human_epochs is None else {"reward.epochs": args.human_epochs}
    config = with_overrides(bench.config, overrides)
    row: dict[str, Any] = {"folds": args.folds, "epochs": config.reward.epochs, "training": []}
    found: list[Found] = []
    bench.backbone.free_trunks()
    for number, fold in enumerate(folds):
        others = [root for root in roots if root not in fold]
        stops = set(others[: max(1, round(len(others) * _VALIDATION_SHARE))])
        parts = {
            "train": _groups(prepared, set(others) - stops),
            "validation": _groups(prepared, stops),
        }
        with timed(row, f"fold {number}"):
            result = bench.train_reward(f"human {number}", parts, config)
            row["training"].append(training_json(result.loop))
            unseen = [item for item in prepared if item.judged.root in fold]
            found += [_judge(result.model, item) for item in unseen]
    row["sets"] = {
        source: _figures([item for item in found if item.source == source]) for source in _READERS
    }
    return row | _figures(found) | {"target": "beats length only; aim 0.62"}


def _groups(prepared: Sequence[Prepared], roots: set[str]) -> list[Group]:
    return [item.group for item in prepared if item.judged.root in roots]


def _chosen(directory: Path, args: Any) -> list[Judged]:
    """Return each set's prompts without repeats, as many as asked for, drawn by the seed."""
    seen: set[str] = set()
    found: list[Judged] = []
    for source, read in _READERS.items():
        items = []
        for item in read(directory / f"{source}.jsonl.gz"):
            key = cluster_of("", " ".join(turn["content"] for turn in item.messages))
            if key not in seen and item.orders:
                seen.add(key)
                items.append(item)
        random.Random(f"{args.seed}:{source}").shuffle(items)
        found += items[: args.human_prompts or len(items)]
        say(
            f"{source}: {min(len(items), args.human_prompts or len(items))} of {len(items)} prompts"
        )
    return found


def _prepare(item: Judged, bench: Bench) -> Prepared:
    args = bench.args
    group = Group(chat_ids(bench.tokenizer, item.messages)[-args.human_prompt_tokens :])
    places, lengths = {}, {}
    for number, answer in enumerate(item.answers):
        ids = bench.encoder.encode_answer(answer)
        places[number] = group.index(ids[: args.human_answer_tokens])
        lengths[places[number]] = len(ids)
    for answers, ranks in item.orders:
        indices = tuple(places[answer] for answer in answers)
        if len(set(indices)) == len(indices):  # the same once cut: nothing to learn
            group.orders.append(Order(indices, ranks, item.source))
    return Prepared(item, group, lengths)


def _judge(model: RewardModel, item: Prepared) -> Found:
    rewards = model.score([item.group.row]).mean(1).tolist()
    pairs, right, longer = 0, 0.0, 0.0
    for order in item.group.orders:
        ranked = zip(order.answers, order.ranks, strict=True)
        for (a, rank_a), (b, rank_b) in itertools.combinations(ranked, 2):
            if rank_a == rank_b:
                continue
            better, worse = (a, b) if rank_a < rank_b else (b, a)
            pairs += 1
            right += _above(rewards[better], rewards[worse])
            longer += _above(item.lengths[better], item.lengths[worse])
    return Found(item.judged.source, pairs, right, longer)


def _above(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def _figures(found: Sequence[Found]) -> dict[str, Any]:
    n = [item.pairs for item in found]
    total = sum(n)
    if not total:
        return {"pairs": 0}
    right, longer = [item.right for item in found], [item.longer for item in found]
    # The better of both directions, chosen on the very pairs that it is judged on.
    by_length = (
        longer if sum(longer) * 2 >= total else [k - v for k, v in zip(n, longer, strict=True)]
    )
    gains = [r - v for r, v in zip(right, by_length, strict=True)]
    return {
        "prompts": len(found),
        "pairs": total,
        "accuracy": sum(right) / total,
        "interval": ratio_interval(right, n),
        "wilson_interval": wilson_interval(sum(right), total),
        "length_only_accuracy": sum(by_length) / total,
        "gain_over_length": sum(gains) / total,
        "gain_interval": ratio_interval(gains, n),
    }


def _lines(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _read_hh(path: Path) -> Iterator[Judged]:
    for item in _lines(path):
        _, *parts = _TURN.split(item["prompt"])
        turns = list(zip(parts[::2], parts[1::2], strict=True))[:-1]  # the last is to be written
        messages = [
            {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
            for who, text in turns
        ]
        if messages and messages[-1]["role"] == "user":
            answers = item["chosen"].strip(), item["rejected"].strip()
            yield Judged("hh_helpful", messages, answers, (((0, 1), (0, 1)),))


def _read_fine_grained(path: Path) -> Iterator[Judged]:
    """Read comparisons: 1 says that the first of two is better, 2 the second, 0 neither."""
    for item in _lines(path):
        answers = tuple(item[f"prediction {number}"].strip() for number in range(1, 5))
        ranks = {0: (0, 0), 1: (0, 1), 2: (1, 0)}
        pairs = itertools.combinations(range(4), 2)
        orders = tuple(
            (pair, ranks[said]) for pair, said in zip(pairs, item["preference"], strict=True)
        )
        if any(item["preference"]):
            messages = [{"role": "user", "content": item["question"].strip()}]
            yield Judged("fine_grained_qa", messages, answers, orders)


def _read_oasst(path: Path) -> Iterator[Judged]:
    for tree in _lines(path):
        yield from _ranked(tree["prompt"], [])


def _ranked(node: Mapping[str, Any], before: Messages) -> Iterator[Judged]:
    """Yield the ranked replies below a message of a tree."""
    messages = [*before, {"role": _ROLES[node["role"]], "content": node["text"]}]
    replies = [
        reply
        for reply in node["replies"]
        if reply["role"] == "assistant" and reply.get("rank") is not None
    ]
    if node["role"] == "prompter" and len(replies) > 1:
        answers = tuple(reply["text"] for reply in replies)
        order = tuple(range(len(replies))), tuple(int(reply["rank"]) for reply in replies)
        yield Judged("oasst_en_100_trees", messages, answers, (order,))
    for reply in node["replies"]:
        yield from _ranked(reply, messages)


_READERS: dict[str, Callable[[Path], Iterator[Judged]]] = {
    "hh_helpful": _read_hh,
    "fine_grained_qa": _read_fine_grained,
    "oasst_en_100_trees": _read_oasst,
}

"""From a dataset to the examples of each method: everything about one prompt in one row.

Owns the grouping by prompt (each answer computed once, however often it was judged), and what
each kind of event says to a reward model, to DPO, KTO and SFT. Critiques and labels are kept in the
dataset, and nothing here learns from them. It knows no tensors. Pure, any thread.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from heedful_trainer.config import DpoSettings
from heedful_trainer.dataset.examples import Example, Split
from heedful_trainer.packing import Row

# A row holds every answer to a prompt; a much-used prompt is cut into several.
MAX_ROW_TOKENS = 4096
_LIKED, _DISLIKED = 5, 3  # of the Likert scale; 4 says nothing


@dataclass(frozen=True, slots=True)
class Order:
    """One ranking of answers of a row."""

    answers: tuple[int, ...]  # indices within the row
    ranks: tuple[int, ...]  # small is good, equal is tied
    source: str


@dataclass(frozen=True, slots=True)
class Correction:
    """A person's rewrite beside what was served, as indices within the row."""

    corrected: int
    served: int
    edit_distance: float


@dataclass(slots=True)
class Group:
    """Everything that was said about the answers to one prompt."""

    prompt: tuple[int, ...]
    answers: dict[tuple[int, ...], int] = field(default_factory=dict)  # ids → index in the row
    orders: list[Order] = field(default_factory=list)
    all_bad: list[tuple[int, ...]] = field(default_factory=list)
    thumbs: list[tuple[int, bool]] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    demonstrations: list[int] = field(default_factory=list)
    raters: list[str] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """The prompt with its answers."""
        return Row(self.prompt, tuple(self.answers))

    def index(self, ids: tuple[int, ...]) -> int:
        """Return an answer's place in the row, giving it one where it is new."""
        return self.answers.setdefault(ids, len(self.answers))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers of a row and how probable it is that the first is better."""

    first: int
    second: int
    target: float
    weight: float


def group_by_prompt(examples: Iterable[Example], split: Split) -> list[Group]:
    """Return one part of a dataset by prompt, in order of first appearance."""
    groups: list[Group] = []
    current: dict[tuple[int, ...], Group] = {}
    ratings: dict[tuple[str, tuple[int, ...]], list[Example]] = {}
    for example in examples:
        if example.split != split or example.kind in ("critique", "label"):
            continue
        group = current.get(example.prompt)
        if group is None or group.row.num_tokens + _size(example) > MAX_ROW_TOKENS:
            group = current[example.prompt] = Group(example.prompt)
            groups.append(group)
        if example.kind == "rating":
            ratings.setdefault((example.rater, example.prompt), []).append(example)
        else:
            _add(group, example)
    for (_, prompt), rated in ratings.items():
        _add_ratings(current[prompt], rated)
    return [group for group in groups if group.answers]


def pairs_of(group: Group, settings: DpoSettings) -> list[Pair]:
    """Return the pairs that DPO learns from; the weights of one ranking add up to 1."""
    pairs: list[Pair] = []
    for order in group.orders:
        found = list(itertools.combinations(range(len(order.answers)), 2))
        for i, j in found:
            tied = order.ranks[i] == order.ranks[j]
            first, second = (i, j) if order.ranks[i] <= order.ranks[j] else (j, i)
            weight = (settings.tie_weight if tied else 1.0) / len(found)
            target = 0.5 if tied else 1.0
            if weight:
                ends = order.answers[first], order.answers[second]
                pairs.append(Pair(*ends, target, weight))
    pairs += [
        Pair(item.corrected, item.served, 1.0, settings.correction_weight)
        for item in group.corrections
        if settings.correction_weight
    ]
    return pairs


def thumbs_of(group: Group, *, with_orders: bool) -> list[tuple[int, bool]]:
    """Return (answer, up) for KTO: thumbs, "all bad", and on request the ends of rankings."""
    thumbs = list(group.thumbs)
    thumbs += [(answer, False) for bad in group.all_bad for answer in bad]
    for order in group.orders if with_orders else ():
        best, worst = min(order.ranks), max(order.ranks)
        for answer, rank in zip(order.answers, order.ranks, strict=True):
            if best != worst and rank in (best, worst):
                thumbs.append((answer, rank == best))
    if with_orders:
        thumbs += [(item.corrected, True) for item in group.corrections]
        thumbs += [(item.served, False) for item in group.corrections]
    return thumbs


def written_by_people(group: Group) -> list[int]:
    """Return the answers that people wrote: what SFT imitates."""
    return [*(item.corrected for item in group.corrections), *group.demonstrations]


def counts(groups: Sequence[Group]) -> Counter[str]:
    """Return what there is to learn from, by kind; ties and decided pairs are told apart."""
    found: Counter[str] = Counter()
    for group in groups:
        for order in group.orders:
            for a, b in itertools.combinations(order.ranks, 2):
                found["ties" if a == b else "pairs"] += 1
        found["comparisons"] += len(group.orders)
        found["all_bad"] += len(group.all_bad)
        found["thumbs_up"] += sum(up for _, up in group.thumbs)
        found["thumbs_down"] += sum(not up for _, up in group.thumbs)
        found["corrections"] += len(group.corrections)
        found["demonstrations"] += len(group.demonstrations)
    found["thumbs"] = found["thumbs_up"] + found["thumbs_down"]
    return found


def _add(group: Group, example: Example) -> None:
    group.raters.append(example.rater)
    indices = tuple(group.index(answer.ids) for answer in example.answers)
    match example.kind:
        case "ranking":
            # Two samples may be the same text; it cannot be better than itself.
            if len(set(indices)) == len(indices):
                group.orders.append(Order(indices, example.ranks, example.source))
            if example.all_bad:
                group.all_bad.append(tuple(dict.fromkeys(indices)))
        case "thumb":
            group.thumbs.append((indices[0], bool(example.up)))
        case "correction":
            corrected = group.index(example.corrected)
            if corrected != indices[0]:
                item = Correction(corrected, indices[0], example.edit_distance)
                group.corrections.append(item)
        case "demonstration":
            group.demonstrations.append(group.index(example.corrected))
        case _:
            raise AssertionError(f"no rule for {example.kind}")


def _add_ratings(group: Group, rated: Sequence[Example]) -> None:
    """Add one person's ratings of answers to one prompt: an order, or a thumb where it is one."""
    values = {group.index(example.answers[0].ids): example.value or 0 for example in rated}
    group.raters.append(rated[0].rater)
    if len(values) > 1:
        ranks = tuple(-value for value in values.values())
        group.orders.append(Order(tuple(values), ranks, "rating"))
        return
    for answer, value in values.items():
        if value >= _LIKED or value <= _DISLIKED:
            group.thumbs.append((answer, value >= _LIKED))


def _size(example: Example) -> int:
    return sum(len(answer.ids) for answer in example.answers) + len(example.corrected)

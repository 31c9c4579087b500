"""What each method reads out of a dataset: one row per prompt, ties kept, weights that add up."""

from dataclasses import replace
from typing import Any

import pytest
from heedful_trainer.config import DpoSettings
from heedful_trainer.dataset import builders
from heedful_trainer.dataset.builders import Pair, group_by_prompt
from heedful_trainer.dataset.examples import Answer, Example

A, B, C, D = (Answer((n, 258)) for n in (1, 2, 3, 4))


def example(kind: Any, answers: tuple[Answer, ...], **more: Any) -> Example:
    return Example(
        **{
            "seq": 1,
            "kind": kind,
            "split": "train",
            "cluster": "c",
            "prompt": (9,),
            "answers": answers,
            "rater": "ann",
            **more,
        }
    )


def test_everything_about_a_prompt_is_one_row() -> None:
    (group,) = group_by_prompt(
        [
            example("ranking", (A, B), ranks=(0, 1)),
            example("thumb", (B,), up=True),
            example("correction", (A,), corrected=(7, 258), edit_distance=0.5),
            example("critique", (A,), text="no"),
            example("ranking", (C, D), ranks=(0, 0), all_bad=True),
            replace(example("thumb", (A,), up=True), split="gate"),
        ],
        "train",
    )
    assert group.row.answers == (A.ids, B.ids, (7, 258), C.ids, D.ids)
    assert group.thumbs == [(1, True)]
    assert group.all_bad == [(3, 4)]
    there = builders.counts([group])
    assert (there["pairs"], there["ties"], there["thumbs"], there["corrections"]) == (1, 1, 1, 1)


def test_pairs_of_a_ranking_weigh_one_together_and_keep_ties() -> None:
    (group,) = group_by_prompt([example("ranking", (A, B, C), ranks=(1, 0, 1))], "train")
    pairs = builders.pairs_of(group, DpoSettings(tie_weight=1.0))
    third = pytest.approx(1 / 3)
    assert pairs == [Pair(1, 0, 1.0, third), Pair(0, 2, 0.5, third), Pair(1, 2, 1.0, third)]
    assert len(builders.pairs_of(group, DpoSettings(tie_weight=0.0))) == 2


def test_a_correction_is_a_pair_of_its_own_weight() -> None:
    (group,) = group_by_prompt([example("correction", (A,), corrected=(7, 258))], "train")
    assert builders.pairs_of(group, DpoSettings()) == [Pair(1, 0, 1.0, 0.5)]
    assert builders.written_by_people(group) == [1]


def test_one_persons_ratings_of_a_prompt_are_an_order_and_alone_a_thumb() -> None:
    rated = [example("rating", (A,), value=6), example("rating", (B,), value=3)]
    (group,) = group_by_prompt(rated, "train")
    assert [(order.answers, order.ranks) for order in group.orders] == [((0, 1), (-6, -3))]
    assert not group.thumbs
    (alone,) = group_by_prompt(rated[:1], "train")
    assert alone.thumbs == [(0, True)]
    assert group_by_prompt([example("rating", (A,), value=4)], "train")[0].thumbs == []


def test_thumbs_include_all_bad_and_on_request_the_ends_of_rankings() -> None:
    (group,) = group_by_prompt(
        [
            example("ranking", (A, B, C), ranks=(0, 1, 2)),
            example("ranking", (A, D), ranks=(0, 0), all_bad=True),
        ],
        "train",
    )
    down = [(0, False), (3, False)]
    assert builders.thumbs_of(group, with_orders=False) == down
    assert builders.thumbs_of(group, with_orders=True) == [*down, (0, True), (2, False)]


def test_the_same_text_twice_is_not_better_than_itself() -> None:
    (group,) = group_by_prompt([example("ranking", (A, A), ranks=(0, 1))], "train")
    assert group.orders == []


def test_a_much_used_prompt_is_cut_into_rows() -> None:
    events = [
        example("ranking", (Answer((i, *range(1000))), Answer((i, *range(900)))), ranks=(0, 1))
        for i in range(6)
    ]
    groups = group_by_prompt(events, "train")
    assert len(groups) == 3
    assert max(group.row.num_tokens for group in groups) <= builders.MAX_ROW_TOKENS

"""From a real log to a dataset: what is kept, what is left out and why, and where it goes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heedful_store import (
    Completion,
    Consent,
    Correction,
    Critique,
    FeedbackEvent,
    Judgement,
    Label,
    Profile,
    Ranking,
    Rating,
    Scope,
    Store,
    Thumb,
    uuid7,
)
from heedful_trainer.config import DatasetSettings
from heedful_trainer.dataset import snapshot
from heedful_trainer.dataset.examples import read
from heedful_trainer.dataset.snapshot import BaseIdentity, Snapshot
from heedful_trainer.dataset.text import TextEncoder

EOS = 258
BASE = BaseIdentity("tiny@1", "t" * 8)
Say = Callable[..., int]
AddAnswer = Callable[..., Completion]


@pytest.fixture
def say(store: Store) -> Say:
    def add(judgement: Judgement, completion: Completion | None = None, **more: Any) -> int:
        event = FeedbackEvent(
            feedback_id=uuid7(),
            scope=Scope(),
            judgement=judgement,
            completion_id=completion.completion_id if completion else None,
            **{"rater_id": "ann", **more},
        )
        return store.append_feedback(event).result().seq

    return add


@pytest.fixture
def taken(store: Store, tiny_model_dir: Path) -> Callable[..., Snapshot]:
    encoder = TextEncoder(tiny_model_dir)

    def take(profile: Profile = "personal", **settings: Any) -> Snapshot:
        return snapshot.take(
            store.judged_feedback(Scope(), profile),
            base=BASE,
            profile=profile,
            settings=DatasetSettings(**settings),
            encoder=encoder,
        )

    return take


def reasons(found: Snapshot) -> dict[int, str | None]:
    return {row.feedback_seq: row.reason for row in found.inputs if row.split == "excluded"}


def test_every_kind_becomes_an_example(add_answer: AddAnswer, say: Say, taken: Any) -> None:
    a, b, c = (add_answer(ids=(40 + i, EOS), text=f"{i}") for i in range(3))
    names = [item.completion_id for item in (a, b, c)]
    say(Ranking(((names[1],), (names[0], names[2])), all_bad=True))
    say(Thumb(up=False), a)
    say(Rating(6), b)
    say(Correction("better"), c)
    say(Critique("too short"), a)
    say(Label({"hallucination": True}), b)
    examples = {example.kind: example for example in taken().examples}
    assert examples["ranking"].ranks == (0, 1, 1)
    assert examples["ranking"].all_bad
    assert [answer.ids[0] for answer in examples["ranking"].answers] == [41, 40, 42]
    assert examples["thumb"].up is False
    assert examples["rating"].value == 6
    assert examples["critique"].text == "too short"
    assert examples["label"].flags == {"hallucination": True}


def test_what_people_write_is_tokenised_once_and_ends(
    add_answer: AddAnswer, say: Say, taken: Any, tiny_model_dir: Path
) -> None:
    say(Correction("ok <|im_end|> no"), add_answer())
    (example,) = taken().examples
    assert example.corrected[-1] == EOS
    # What looks like a control token in a person's text is text.
    assert EOS not in example.corrected[:-1]
    assert TextEncoder(tiny_model_dir).decode(example.corrected) == "ok <|im_end|> no"
    assert 0 < example.edit_distance <= 1


def test_cut_answers_never_get_an_end_token(add_answer: AddAnswer, say: Say, taken: Any) -> None:
    cut = add_answer(ids=(1, 2, 3), finish_reason="length")
    say(Thumb(up=True), cut)
    long = add_answer(prompt="other", ids=(*range(1, 30), EOS))
    say(Thumb(up=True), long)
    first, second = taken(max_answer_tokens=10).examples
    assert first.answers[0].ids == (1, 2, 3)
    assert second.answers[0].ids == tuple(range(1, 11))


def test_sampled_ids_are_kept_even_where_the_text_would_give_others(
    add_answer: AddAnswer, say: Say, taken: Any
) -> None:
    say(Thumb(up=True), add_answer(ids=(7, 7, 7, EOS), text="something else"))
    assert taken().examples[0].answers[0].ids == (7, 7, 7, EOS)


def test_an_imported_demonstration_is_no_correction(
    add_answer: AddAnswer, say: Say, taken: Any
) -> None:
    say(Correction("I"), add_answer(text="I", origin="human"))
    (example,) = taken().examples
    assert (example.kind, example.corrected) == ("demonstration", (40, EOS))


def test_what_is_left_out_says_why(add_answer: AddAnswer, say: Say, taken: Any) -> None:
    mine, other = add_answer(prompt="a"), add_answer(prompt="b", ids=(50, EOS))
    foreign = say(Thumb(up=True), add_answer(base_id="other@1"))
    silent = say(Thumb(up=True), add_answer(consent=Consent(train=False)))
    mixed = say(Ranking(((mine.completion_id,), (other.completion_id,))))
    empty = say(Thumb(up=True), add_answer(prompt="c", ids=()))
    same = say(Correction("I"), add_answer(prompt="d", text="I"))
    judge = say(Thumb(up=True), add_answer(prompt="e"), rater_kind="judge")
    assert reasons(taken()) == {
        foreign: "other_base",
        silent: "no_consent",
        mixed: "different_prompts",
        empty: "empty_answer",
        same: "nothing_changed",
        judge: "judge",
    }


def test_the_same_statement_counts_once(add_answer: AddAnswer, say: Say, taken: Any) -> None:
    say(Thumb(up=True), add_answer())
    again = say(Thumb(up=True), add_answer())  # another answer with the same ids
    say(Thumb(up=True), add_answer(), rater_id="bob")  # another person
    found = taken()
    assert reasons(found) == {again: "duplicate"}
    assert len(found.examples) == 2


def test_the_same_log_gives_the_same_bytes(
    add_answer: AddAnswer, say: Say, taken: Any, tmp_path: Path
) -> None:
    for i in range(12):
        say(Thumb(up=i % 2 == 0), add_answer(prompt=f"question {'x' * i}"))
    lines = taken().lines()
    assert snapshot.dataset_id(lines) == snapshot.dataset_id(taken().lines())
    path = tmp_path / "dataset.jsonl"
    path.write_bytes(lines)
    assert read(path) == list(taken().examples)


def test_twenty_comparisons_fill_every_part(add_answer: AddAnswer, say: Say, taken: Any) -> None:
    for i in range(20):
        say(Thumb(up=True), add_answer(prompt=f"question {chr(97 + i)}"))
    parts = Counter(example.split for example in taken().examples)
    assert min(parts["validation"], parts["calibration"], parts["gate"]) >= 3
    assert parts["train"] >= 8


def test_a_prompt_stays_in_its_part_as_the_log_grows(
    add_answer: AddAnswer, say: Say, taken: Any
) -> None:
    for i in range(60):
        say(Thumb(up=True), add_answer(prompt=f"question {'ab'[i % 2] * (i // 2 + 1)}"))
    before = {example.seq: example.split for example in taken().examples}
    for i in range(60):
        say(Thumb(up=True), add_answer(prompt=f"another {'cd'[i % 2] * (i // 2 + 1)}"))
    after = {example.seq: example.split for example in taken().examples}
    assert before == {seq: after[seq] for seq in before}


def test_with_enough_people_parts_are_split_by_rater_and_share_no_prompt(
    add_answer: AddAnswer, say: Say, taken: Any
) -> None:
    for i in range(40):
        for rater in range(3):
            prompt = "everybody asks this" if rater == 0 else f"{chr(97 + i)}{'xy'[rater - 1]}"
            say(Thumb(up=True), add_answer(prompt=prompt), rater_id=f"rater-{i}")
    found = taken(profile="team")
    assert found.split_by == "rater"
    parts: dict[str, set[str]] = {}
    prompts: dict[str, set[str]] = {}
    for example in found.examples:
        parts.setdefault(example.rater, set()).add(example.split)
        prompts.setdefault(example.cluster, set()).add(example.split)
    assert all(len(part) == 1 for part in parts.values())
    assert all(len(part) == 1 for part in prompts.values())
    assert "prompt_in_other_part" in reasons(found).values()
    assert taken(profile="personal").split_by == "prompt"


def test_prompts_that_differ_in_case_or_numbers_are_one_cluster() -> None:
    from heedful_trainer.dataset.splits import cluster_of

    assert cluster_of("", "What is 2 + 2?") == cluster_of("", "what is 31 + 7")
    assert cluster_of("", "What is red?") != cluster_of("", "What is blue?")

"""The log at one moment as a dataset: which events, in which part, and why others are left out.

Owns the reading of the store, the reasons beyond those of the fates (another base, nothing said,
said before), the split and the file with its hash. Caps and consent are decided by the store. It
knows no method. One thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

from heedful_store import (
    Completion,
    Correction,
    Critique,
    Judged,
    Label,
    Profile,
    Ranking,
    Rating,
    Retraction,
    RunInput,
    Thumb,
)

from heedful_trainer.config import DatasetSettings
from heedful_trainer.dataset import splits
from heedful_trainer.dataset.examples import Answer, Example, to_lines
from heedful_trainer.dataset.text import TextEncoder, edit_distance


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The model whose token ids a dataset holds."""

    base_id: str
    template_hash: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A dataset and the account of every event that was read."""

    examples: tuple[Example, ...]  # in order of the log
    inputs: tuple[RunInput, ...]  # every event: its part, or why it is left out
    split_by: str  # "prompt" or "rater"
    to_log_seq: int  # cursor of the last event read

    def lines(self) -> bytes:
        """Return the file's bytes."""
        return to_lines(self.examples)


def dataset_id(lines: bytes) -> str:
    """Return the content hash of a dataset."""
    return hashlib.sha256(lines).hexdigest()


def take(
    judged: Iterable[Judged],
    *,
    base: BaseIdentity,
    profile: Profile,
    settings: DatasetSettings,
    encoder: TextEncoder,
) -> Snapshot:
    """Turn judged events into a dataset; the same events give the same bytes.

    Args:
        judged: of the store, in order of ``seq``.
        base: events on answers of another model are left out: their ids mean something else.
        profile: with people who know each other or not, parts are split by rater.
        settings: lengths and shares.
        encoder: for what people wrote.
    """
    examples: list[Example] = []
    left_out: dict[int, str] = {}
    seen: set[tuple[Any, ...]] = set()
    cursor = 0
    for item in judged:
        seq = item.feedback.seq
        cursor = max(cursor, item.feedback.log_seq or seq)
        found = _example(item, base, settings, encoder)
        if isinstance(found, Example) and _said(found) in seen:
            found = "duplicate"
        if isinstance(found, str):
            left_out[seq] = found
            continue
        seen.add(_said(found))
        examples.append(found)
    kept, split_by = _split(examples, profile, settings, left_out)
    parts = {example.seq: example.split for example in kept}
    inputs = [RunInput(seq, "excluded", reason) for seq, reason in left_out.items()]
    inputs += [RunInput(seq, part) for seq, part in parts.items()]
    inputs.sort(key=lambda row: row.feedback_seq)
    return Snapshot(tuple(kept), tuple(inputs), split_by, cursor)


def _split(
    examples: Sequence[Example],
    profile: Profile,
    settings: DatasetSettings,
    left_out: dict[int, str],
) -> tuple[list[Example], str]:
    people = {example.seq: example.rater or example.end_user for example in examples}
    by_rater = profile != "personal" and len(set(people.values()) - {""}) >= splits.MIN_PEOPLE
    units = {e.seq: (people[e.seq] if by_rater else "") or e.cluster for e in examples}
    parts = splits.assign(units.values(), settings)
    placed = [replace(example, split=parts[units[example.seq]]) for example in examples]
    if not by_rater:
        return placed, "prompt"
    crossing = splits.separate(
        {example.seq: example.cluster for example in placed},
        {example.seq: example.split for example in placed},
    )
    left_out |= dict.fromkeys(crossing, "prompt_in_other_part")
    return [example for example in placed if example.seq not in crossing], "rater"


def _said(example: Example) -> tuple[Any, ...]:
    """Return what makes two events the same statement of the same person."""
    return (
        example.rater,
        example.kind,
        example.prompt,
        tuple(answer.ids for answer in example.answers),
        example.ranks,
        (example.all_bad, example.up, example.value, example.text),
        example.corrected,
        tuple(sorted(example.flags.items())),
    )


def _example(
    item: Judged, base: BaseIdentity, settings: DatasetSettings, encoder: TextEncoder
) -> Example | str:
    """Return an event as an example, or why it is none."""
    event = item.feedback.event
    if not item.fate.trainable or event is None:
        return item.fate.reason or "erased"
    for answer in item.answers:
        if (answer.base_id, answer.template_hash) != (base.base_id, base.template_hash):
            return "other_base"
    first = item.answers[0]
    assert first.payload is not None
    if not first.payload.prompt_ids:
        return "empty_prompt"
    if any(_prompt(answer) != _prompt(first) for answer in item.answers):
        return "different_prompts"
    messages = first.payload.messages or ""
    bare = Example(
        seq=item.feedback.seq,
        kind="thumb",
        split="train",
        cluster=splits.cluster_of(messages, first.payload.prompt_text),
        prompt=_prompt(first)[-settings.max_prompt_tokens :],
        answers=tuple(_answer(answer, settings) for answer in item.answers),
        rater=event.rater_id,
        end_user=first.end_user,
        source="comparison" if event.comparison_id else event.source,
        messages=messages,
    )
    return _with_judgement(bare, item, settings, encoder)


def _with_judgement(
    bare: Example, item: Judged, settings: DatasetSettings, encoder: TextEncoder
) -> Example | str:
    event = item.feedback.event
    assert event is not None
    match event.judgement:
        case Ranking(groups, all_bad):
            return _ranking(bare, groups, all_bad)
        case _ if not bare.answers[0].ids:
            return "empty_answer"
        case Thumb(up):
            return replace(bare, kind="thumb", up=up)
        case Rating(value):
            return replace(bare, kind="rating", value=value)
        case Correction(text):
            return _correction(bare, text, item.answers[0], settings, encoder)
        case Critique(text):
            return replace(bare, kind="critique", text=text)
        case Label(flags):
            return replace(bare, kind="label", flags=dict(flags))
        case Retraction():
            return "retraction"
        case _:
            assert_never(event.judgement)


def _ranking(bare: Example, groups: tuple[tuple[str, ...], ...], all_bad: bool) -> Example | str:
    rank = {name: place for place, group in enumerate(groups) for name in group}
    answers = [answer for answer in bare.answers if answer.ids]
    ranks = [rank[answer.completion_id] for answer in answers]
    if len(answers) < 2:
        return "empty_answer"
    return replace(
        bare, kind="ranking", answers=tuple(answers), ranks=tuple(ranks), all_bad=all_bad
    )


def _correction(
    bare: Example,
    text: str,
    served: Completion,
    settings: DatasetSettings,
    encoder: TextEncoder,
) -> Example | str:
    assert served.payload is not None
    # A demonstration is an answer that a person wrote; its correction repeats it.
    if served.origin == "human" and served.payload.completion_text == text:
        return replace(bare, kind="demonstration", corrected=bare.answers[0].ids, answers=())
    ids = encoder.encode_answer(text)
    if ids == bare.answers[0].ids or text == served.payload.completion_text:
        return "nothing_changed"
    return replace(
        bare,
        kind="correction",
        corrected=ids[: settings.max_answer_tokens],
        edit_distance=edit_distance(ids, bare.answers[0].ids),
    )


def _prompt(answer: Completion) -> tuple[int, ...]:
    assert answer.payload is not None
    return tuple(answer.payload.prompt_ids)


def _answer(answer: Completion, settings: DatasetSettings) -> Answer:
    assert answer.payload is not None
    ids = tuple(answer.payload.completion_ids)[: settings.max_answer_tokens]
    return Answer(ids, answer.completion_id, answer.policy_version)

"""Feedback carried to another base model: the same texts as that model's tokens.

Token ids belong to one tokenizer and prompts to one chat template, so a new base learns from
copies: every current judgement whose answers still have their texts is written once more, about
answers that are tokenized anew. A copy keeps who said what, consent, end user and time, and so also
what an erasure or a retention time will remove. It has no log-probs: the new base never sampled it.
Ids are derived from the originals, so a migration can be repeated: what was said since is added,
and a copy whose original was taken back is taken back too. Reads and writes the store; one thread.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from heedful_store import (
    Ack,
    Completion,
    CompletionPayload,
    FeedbackEvent,
    FeedbackFilter,
    Judged,
    Judgement,
    Profile,
    Ranking,
    Receipt,
    Scope,
    Store,
)
from heedful_store.judgements import ranked_ids

from heedful_server.errors import InvalidRequest
from heedful_server.feedback.importing import derived_id
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer

SOURCE = "migrate:"
_BATCH = 200
_CUT = ("length", "deadline", "cancelled", "error")
_REFUSED = "the chat template refuses its prompt"
_SAME_BASE = "belongs to it already"
_NO_TEXT = "its text is gone"
_NO_ANSWER = "its answers are gone"


@dataclass(frozen=True, slots=True)
class NewBase:
    """The model that the feedback goes to."""

    base_id: str
    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def source(self) -> str:
        """Where its copies say they come from."""
        return f"{SOURCE}{self.base_id}/{self.template.identity[:16]}"


@dataclass(slots=True)
class Migrated:
    """What became of the judgements of one project."""

    project: str
    copied: int = 0
    known: int = 0
    """Copied by an earlier run."""
    taken_back: int = 0
    """Copies whose originals no longer count."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Judgements that cannot be carried, by the reason."""


@dataclass(frozen=True, slots=True)
class _Copy:
    answers: tuple[Completion, ...]
    event: FeedbackEvent


def migrate(
    store: Store,
    scope: Scope,
    profile: Profile,
    base: NewBase,
    *,
    dry_run: bool = False,
) -> Migrated:
    """Carry a project's current judgements to a base; return what became of them.

    Args:
        store: the store, which a server may have open too.
        scope: the project.
        profile: of the project.
        base: where they go.
        dry_run: count only.

    Raises:
        StoreError: the store failed; what was written before stays, and a repetition goes on.
    """
    report = Migrated(scope.project)
    expected: set[str] = set()
    judged = store.judged_feedback(scope, profile)
    while batch := list(islice(judged, _BATCH)):
        copies = list(_copies(batch, scope, base, report))
        expected.update(copy.event.feedback_id for copy in copies)
        if dry_run:
            report.copied += len(copies)
        else:
            _write(store, copies, report)
    if not dry_run:
        report.taken_back = _take_back(store, scope, base, expected)
    return report


def _copies(
    batch: Sequence[Judged], scope: Scope, base: NewBase, report: Migrated
) -> Iterator[_Copy]:
    skipped: Counter[str] = Counter(report.skipped)
    for judged in batch:
        event = judged.feedback.event
        if event is None or event.source.startswith(SOURCE):
            # Copies are never copied: each base gets its own from the originals.
            continue
        problem = _problem(judged, base)
        if problem:
            skipped[problem] += 1
            continue
        try:
            yield _copy(judged, event, scope, base)
        except InvalidRequest:
            skipped[_REFUSED] += 1
    report.skipped = dict(skipped)


def _problem(judged: Judged, base: NewBase) -> str:
    """Return why a judgement cannot be carried, or an empty text."""
    event, answers = judged.feedback.event, judged.answers
    assert event is not None
    if not answers or len(answers) < len(ranked_ids(event.judgement)):
        return _NO_ANSWER
    if all(_is_of(answer, base) for answer in answers):
        return _SAME_BASE
    return _NO_TEXT if any(answer.payload is None for answer in answers) else ""


def _is_of(answer: Completion, base: NewBase) -> bool:
    return (answer.base_id, answer.template_hash) == (base.base_id, base.template.identity)


def _copy(judged: Judged, event: FeedbackEvent, scope: Scope, base: NewBase) -> _Copy:
    answers = tuple(_answer(answer, scope, base) for answer in judged.answers)
    names = {
        old.completion_id: new.completion_id
        for old, new in zip(judged.answers, answers, strict=True)
    }
    return _Copy(
        answers,
        replace(
            event,
            feedback_id=derived_id(scope, base.source, event.feedback_id, "feedback"),
            judgement=_about(event.judgement, names),
            completion_id=names.get(event.completion_id or ""),
            # A vote between two policies of another base is no evidence about this one's.
            comparison_id=None,
            # An edit that counts is a judgement of its own here; what it replaced is not carried.
            supersedes_id=None,
            source=base.source,
        ),
    )


def _answer(answer: Completion, scope: Scope, base: NewBase) -> Completion:
    """Return an answer as the new base's tokens.

    Raises:
        InvalidRequest: the template refuses the conversation.
    """
    old = answer.payload
    assert old is not None
    prompt_ids, prompt_text = _prompt(old, base)
    completion_ids = base.tokenizer.encode(old.completion_text, add_special_tokens=False)
    eos_id = base.tokenizer.eos_token_id
    # An answer that was cut did not end there, so it must not teach to end there.
    if answer.finish_reason not in _CUT and eos_id is not None:
        completion_ids.append(eos_id)
    return replace(
        answer,
        completion_id=derived_id(scope, base.source, answer.completion_id, "completion"),
        origin="human" if answer.origin == "human" else "imported",
        policy_hash="",
        base_id=base.base_id,
        template_hash=base.template.identity,
        quantization="",
        kernel_path="",
        sampling={},
        seed=None,
        prompt_tokens=len(prompt_ids),
        completion_tokens=len(completion_ids),
        prompt_hash="",
        payload=CompletionPayload(
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            prompt_text=prompt_text,
            completion_text=old.completion_text,
            messages=old.messages,
        ),
    )


def _prompt(old: CompletionPayload, base: NewBase) -> tuple[list[int], str]:
    if old.messages is None:
        return base.tokenizer.encode(old.prompt_text, add_special_tokens=True), old.prompt_text
    turns = [(turn["role"], turn["content"]) for turn in json.loads(old.messages)]
    rendered = base.template.render(turns)
    return base.tokenizer.encode(rendered, add_special_tokens=False), rendered


def _about(judgement: Judgement, names: dict[str, str]) -> Judgement:
    if not isinstance(judgement, Ranking):
        return judgement
    groups = tuple(tuple(names[name] for name in group) for group in judgement.groups)
    return replace(judgement, groups=groups)


def _write(store: Store, copies: Sequence[_Copy], report: Migrated) -> None:
    """Write copies, answers first; one that is there already changes nothing."""
    answers = {answer.completion_id: answer for copy in copies for answer in copy.answers}
    there = store.get_completions(copies[0].event.scope, answers) if copies else {}
    for ack in [
        store.append_completion(answer) for name, answer in answers.items() if name not in there
    ]:
        ack.result()
    waiting: list[Ack[Receipt]] = [store.append_feedback(copy.event) for copy in copies]
    for receipt in [ack.result() for ack in waiting]:
        if receipt.duplicate:
            report.known += 1
        else:
            report.copied += 1


def _take_back(store: Store, scope: Scope, base: NewBase, expected: set[str]) -> int:
    """Retract the copies whose originals were retracted, replaced or emptied since."""
    stale = [
        stored.event
        for stored in store.export_feedback(FeedbackFilter(scope=scope, current_only=True))
        if stored.event is not None
        and stored.event.source == base.source
        and stored.feedback_id not in expected
    ]
    for ack in [
        store.retract_feedback(
            scope,
            event.feedback_id,
            rater_id=event.rater_id,
            retraction_id=derived_id(scope, base.source, event.feedback_id, "retraction"),
            rater_kind=event.rater_kind,
        )
        for event in stale
    ]:
        ack.result()
    return len(stale)

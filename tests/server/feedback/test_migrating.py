"""Feedback carried to another base: what is copied, what stays, and that it can be repeated."""

import json
from pathlib import Path

import pytest
from heedful_server.feedback.migrating import SOURCE, NewBase, migrate
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer
from heedful_store import (
    Completion,
    CompletionPayload,
    Consent,
    Correction,
    DatabaseOptions,
    FeedbackEvent,
    FeedbackFilter,
    Ranking,
    Scope,
    Store,
    Thumb,
    now_ms,
    uuid7,
)

SCOPE = Scope("local", "app")
NO_RESERVE = DatabaseOptions(min_free_bytes=0)
TURNS = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def store(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}", database=NO_RESERVE) as store:
        yield store


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> NewBase:
    return NewBase("tiny@1", Tokenizer.load(tiny_model_dir), ChatTemplate.load(tiny_model_dir))


def answered(store: Store, text: str, **fields: object) -> Completion:
    payload = CompletionPayload(
        prompt_ids=[5, 6],
        completion_ids=[7, 8],
        prompt_text="<old>Why?",
        completion_text=text,
        messages=fields.pop("messages", json.dumps(TURNS)),
        logprobs=[-1.0, -1.0],
    )
    completion = Completion(
        completion_id=uuid7(),
        scope=SCOPE,
        policy_version="base",
        created_at_ms=now_ms() - 1000,
        base_id=fields.pop("base_id", "old@1"),
        template_hash=fields.pop("template_hash", "old"),
        end_user="ann",
        sampling={"temperature": 1.0},
        seed=3,
        payload=payload,
        **fields,
    )
    store.append_completion(completion).result()
    return completion


def judged(store: Store, judgement, completion: Completion | None = None, **fields) -> str:
    name = uuid7()
    event = FeedbackEvent(
        feedback_id=name,
        scope=SCOPE,
        judgement=judgement,
        rater_id="ann",
        completion_id=completion.completion_id if completion else None,
        **fields,
    )
    store.append_feedback(event).result()
    return name


def carried(store: Store, base: NewBase):
    return [
        item
        for item in store.judged_feedback(SCOPE, "personal")
        if item.feedback.event.source.startswith(SOURCE)
    ]


def run(store: Store, base: NewBase, **options):
    return migrate(store, SCOPE, "personal", base, **options)


def test_texts_become_the_new_bases_tokens(store, base):
    judged(store, Thumb(False, ("dull",)), answered(store, "Because."), tags=("t",))
    report = run(store, base)
    assert (report.copied, report.known, report.skipped) == (1, 0, {})
    [copy] = carried(store, base)
    [answer] = copy.answers
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert answer.payload.prompt_text == rendered
    assert base.tokenizer.decode(answer.payload.prompt_ids, False) == rendered
    assert base.tokenizer.decode(answer.payload.completion_ids, False) == "Because.<|im_end|>"
    assert (answer.base_id, answer.template_hash) == ("tiny@1", base.template.identity)
    assert (answer.origin, answer.seed, answer.sampling) == ("imported", None, {})
    assert list(answer.payload.logprobs) == []
    assert (answer.end_user, answer.policy_version) == ("ann", "base")
    event = copy.feedback.event
    assert (event.judgement, event.rater_id, event.tags) == (Thumb(False, ("dull",)), "ann", ("t",))
    assert copy.fate.trainable


def test_an_answer_that_was_cut_gets_no_end_token(store, base):
    judged(store, Thumb(True), answered(store, "Because", finish_reason="length"))
    run(store, base)
    [copy] = carried(store, base)
    assert base.tokenizer.decode(copy.answers[0].payload.completion_ids, False) == "Because"


def test_plain_text_stays_plain(store, base):
    judged(store, Thumb(True), answered(store, "b", messages=None))
    run(store, base)
    [copy] = carried(store, base)
    assert base.tokenizer.decode(copy.answers[0].payload.prompt_ids, False) == "<old>Why?"


def test_rankings_and_corrections_name_the_copies(store, base):
    first, second = answered(store, "one"), answered(store, "two")
    judged(store, Ranking(((second.completion_id,), (first.completion_id,))))
    judged(store, Correction("three"), first)
    assert run(store, base).copied == 2
    ranking, correction = carried(store, base)
    texts = [answer.payload.completion_text for answer in ranking.answers]
    assert texts == ["two", "one"]
    assert correction.feedback.event.judgement == Correction("three")
    assert correction.answers[0].completion_id == ranking.answers[1].completion_id


def test_a_repetition_adds_what_is_new_and_takes_back_what_was(store, base):
    taken_back = judged(store, Thumb(True), answered(store, "one"))
    judged(store, Thumb(False), answered(store, "two"))
    run(store, base)
    judged(store, Thumb(True), answered(store, "three"))
    store.retract_feedback(SCOPE, taken_back, rater_id="ann").result()
    report = run(store, base)
    assert (report.copied, report.known, report.taken_back) == (1, 1, 1)
    texts = {item.answers[0].payload.completion_text for item in carried(store, base)}
    assert texts == {"two", "three"}
    assert run(store, base).taken_back == 0


def test_copies_are_not_copied_on_to_a_third_base(store, base):
    judged(store, Thumb(True), answered(store, "one"))
    run(store, base)
    other = NewBase("third@1", base.tokenizer, base.template)
    report = run(store, other)
    assert report.copied == 1
    bases = {item.answers[0].base_id for item in carried(store, base)}
    assert bases == {"tiny@1", "third@1"}


def test_what_cannot_be_carried_is_counted_by_reason(store, base):
    gone = answered(store, "one")
    judged(store, Thumb(True), gone)
    store.remove_payload(SCOPE, gone.completion_id).result()
    judged(store, Thumb(True), answered(store, "two"))
    assert run(store, base).skipped == {"its text is gone": 1}
    strict = ChatTemplate("{{ raise_exception('no') }}", {})
    refusing = NewBase("strict@1", base.tokenizer, strict)
    report = run(store, refusing)
    assert report.copied == 0
    assert report.skipped == {"its text is gone": 1, "the chat template refuses its prompt": 1}


def test_what_belongs_to_the_base_already_stays(store, base):
    own = {"base_id": "tiny@1", "template_hash": base.template.identity}
    judged(store, Thumb(True), answered(store, "one", **own))
    report = run(store, base)
    assert (report.copied, report.skipped) == (0, {"belongs to it already": 1})


def test_consent_travels_along(store, base):
    judged(store, Thumb(True), answered(store, "one", consent=Consent(train=False)))
    run(store, base)
    [copy] = carried(store, base)
    assert (copy.fate.trainable, copy.fate.reason) == (False, "no_consent")


def test_an_erasure_reaches_the_copies(store, base):
    judged(store, Thumb(True), answered(store, "secret"))
    run(store, base)
    assert store.erase_user("local", "ann").result().completions == 2
    assert list(store.judged_feedback(SCOPE, "personal")) == []


def test_a_dry_run_writes_nothing(store, base):
    judged(store, Thumb(True), answered(store, "one"))
    assert run(store, base, dry_run=True).copied == 1
    events = store.list_feedback(FeedbackFilter(scope=SCOPE))
    assert len(events) == 1

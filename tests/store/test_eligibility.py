from dataclasses import replace

import pytest
from heedful_store import (
    Consent,
    Counts,
    FeedbackFilter,
    Ranking,
    Rating,
    Retraction,
    RunUse,
    Scope,
    Store,
    StoredFeedback,
    Thumb,
    fate_of,
    uuid7,
)
from heedful_store.registry_schema import deployments, run_inputs, runs
from sqlalchemy import insert

PLENTY = Counts(events=1000, raters=50)


@pytest.fixture
def stored(make):
    return lambda state="stored", **fields: StoredFeedback(
        make.event(**({"completion_id": "c"} | fields)), "f", 1, 1, 1, state
    )


@pytest.mark.parametrize("profile", ["personal", "team", "public"])
def test_a_named_rater_with_consent_is_trainable_everywhere(make, stored, profile) -> None:
    fate = fate_of(stored(), "current", [make.completion()], profile, PLENTY)
    assert fate.trainable
    assert fate.reason is None
    assert fate.tier == ("operator" if profile == "personal" else "user")


def test_each_state_of_the_log_has_its_reason(make, stored) -> None:
    whole = [make.completion()]

    def reason(event, standing="current", answers=whole):
        return fate_of(event, standing, answers, "personal", PLENTY).reason

    assert reason(stored("pending")) == "pending"
    assert reason(stored("dead")) == "dead"
    assert reason(StoredFeedback(None, "f", 1, 1, 1, "erased")) == "erased"
    assert reason(stored(judgement=Retraction())) == "retraction"
    assert reason(stored(), "retracted") == "retracted"
    assert reason(stored(), "superseded") == "superseded"
    assert reason(stored(rater_kind="judge")) == "judge"
    assert reason(stored(consent_train=False)) == "no_consent"
    assert reason(stored(), answers=[]) == "content_removed"
    assert reason(stored(), answers=[make.completion(payload=None)]) == "content_removed"
    no_training = make.completion(consent=Consent("full", False))
    assert reason(stored(), answers=[make.completion(), no_training]) == "no_consent"
    metadata = make.completion(consent=Consent("metadata", True), payload=None)
    assert reason(stored(), answers=[metadata]) == "no_consent"
    erased = replace(no_training, payload=None, erased_at_ms=1)
    assert reason(stored(), answers=[erased]) == "erased"


@pytest.mark.parametrize(
    ("profile", "counts", "fields", "reason"),
    [
        ("personal", Counts(99, 9999, 10, 0), {"rater_id": ""}, None),
        ("team", PLENTY, {"rater_id": ""}, "unknown_rater"),
        ("public", PLENTY, {"rater_id": ""}, "unknown_rater"),
        ("team", Counts(3, 199, 10, 1), {}, None),
        ("team", Counts(4, 0, 10, 1), {}, "prompt_cap"),
        ("team", Counts(0, 200, 10, 1), {}, "rater_cap"),
        ("team", Counts(0, 200, 1000, 1), {}, None),
        ("public", Counts(0, 0, 1000, 4), {}, "too_few_raters"),
        ("public", Counts(1, 1, 1000, 5), {}, None),
        ("public", Counts(2, 0, 10_000, 5), {}, "prompt_cap"),
        ("public", Counts(0, 2, 2000, 5), {}, "rater_cap"),
        ("public", Counts(0, 9, 10_000, 5), {}, None),
        ("public", Counts(0, 10, 10_000, 5), {}, "rater_cap"),
        ("public", Counts(19, 19, 1000, 5), {"rater_kind": "expert"}, None),
        ("public", Counts(0, 20, 1000, 5), {"rater_kind": "expert"}, "rater_cap"),
        ("public", Counts(99, 9999, 10, 0), {"rater_kind": "operator"}, None),
    ],
)
def test_caps_are_absolute_and_by_profile(make, stored, profile, counts, fields, reason) -> None:
    fate = fate_of(stored(**fields), "current", [make.completion()], profile, counts)
    assert fate.reason == reason


def test_every_reader_sees_the_caps_fall_on_the_same_events(store: Store, make) -> None:
    answers = [make.completion(payload=make.payload(f"prompt {i}")) for i in range(6)]
    for answer in answers:
        store.append_completion(answer).result()
    events = [
        make.event(completion_id=answer.completion_id, rater_id=rater)
        for rater in ("mallory", "r1", "r2", "r3", "r4")
        for answer in (answers if rater == "mallory" else answers[:1])
    ]
    for event in events:
        store.append_feedback(event).result()
    judged = list(store.judged_feedback(Scope(), "public"))
    reasons = [item.fate.reason for item in judged]
    assert reasons == [None, None] + ["rater_cap"] * 4 + [None] * 4
    single = [store.feedback_fate(Scope(), e.feedback_id, "public").reason for e in events]
    assert single == reasons
    assert judged[0].answers[0].payload.prompt_text == "prompt 0"


def test_excluded_events_do_not_use_up_a_raters_share(store: Store, make, answered) -> None:
    refused = answered(consent=Consent("full", False)).completion_id
    good = answered().completion_id
    for judgement in (Thumb(True), Rating(3)):
        store.append_feedback(make.event(completion_id=refused, judgement=judgement)).result()
    for number in range(5):
        store.append_feedback(make.event(completion_id=good, rater_id=f"r{number}")).result()
    last = make.event(completion_id=good)
    store.append_feedback(last).result()
    assert store.feedback_fate(Scope(), last.feedback_id, "public").trainable


def test_a_rankings_answers_come_in_its_order(store: Store, make, answered) -> None:
    a, b, c = (answered().completion_id for _ in range(3))
    store.append_feedback(make.event(judgement=Ranking(((c,), (a, b))))).result()
    (item,) = store.judged_feedback(Scope(), "personal")
    assert [answer.completion_id for answer in item.answers] == [c, a, b]


def test_a_retracted_or_edited_event_says_so(store: Store, make, answered) -> None:
    answer = answered().completion_id
    first = make.event(completion_id=answer)
    edit = make.event(completion_id=answer, supersedes_id=first.feedback_id, judgement=Thumb(False))
    for event in (first, edit):
        store.append_feedback(event).result()
    assert store.feedback_fate(Scope(), first.feedback_id, "personal").reason == "superseded"
    assert store.feedback_fate(Scope(), edit.feedback_id, "personal").trainable
    receipt = store.retract_feedback(Scope(), edit.feedback_id, rater_id="ann").result()
    for name, reason in (
        (first.feedback_id, "retracted"),
        (edit.feedback_id, "retracted"),
        (receipt.feedback_id, "retraction"),
    ):
        assert store.feedback_fate(Scope(), name, "personal").reason == reason


def test_the_fate_names_the_runs_that_used_an_event(store: Store, make, answered) -> None:
    event = make.event(completion_id=answered().completion_id)
    seq = store.append_feedback(event).result().seq

    def body(connection) -> None:
        for run, version in (("r1", "v2"), ("r2", None)):
            connection.execute(
                insert(runs).values(
                    run_id=run,
                    tenant="default",
                    project="default",
                    method="dpo",
                    stage="done",
                    status="finished",
                    dataset_id="d",
                    policy_version=version,
                    config="{}",
                    seeds="[]",
                    code_version="1",
                    evidence="{}",
                    created_at_ms=len(run + str(version)),
                )
            )
            connection.execute(
                insert(run_inputs).values(run_id=run, feedback_seq=seq, split="train")
            )
        for at_ms in (70, 50):
            connection.execute(
                insert(deployments).values(
                    tenant="default",
                    project="default",
                    action="promote",
                    version="v2",
                    actor="gate",
                    approved=False,
                    evidence="{}",
                    at_ms=at_ms,
                )
            )

    store.write(body).result()
    uses = store.feedback_fate(Scope(), event.feedback_id, "personal").uses
    assert uses == (RunUse("r1", "d", "train", "v2", 50), RunUse("r2", "d", "train", None, None))
    assert len(store.list_feedback(FeedbackFilter(scope=Scope("default", uuid7())))) == 0

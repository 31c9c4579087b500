import time
from dataclasses import replace

import pytest
from heedful_store import FeedbackFilter, NotFound, Ranking, Scope, Store, Thumb, uuid7
from heedful_store.waiting import SweepReport

ALL = FeedbackFilter(states=("stored", "pending", "dead"))


def states(store: Store) -> list[str]:
    return [stored.state for stored in store.list_feedback(ALL)]


def test_an_event_waits_for_its_answer_and_comes_to_readers_after_it(
    store: Store, make, answered
) -> None:
    late = make.completion()
    early = make.event(completion_id=late.completion_id)
    receipt = store.append_feedback(early, hold_unknown=True).result()
    assert receipt.state == "pending"
    other = make.event(completion_id=answered().completion_id)
    cursor = store.append_feedback(other).result().seq
    assert [s.feedback_id for s in store.feedback_since(Scope(), 0)] == [other.feedback_id]
    store.append_completion(late).result()
    (resolved,) = store.feedback_since(Scope(), cursor)
    assert (resolved.feedback_id, resolved.seq, resolved.state) == (
        early.feedback_id,
        receipt.seq,
        "stored",
    )
    retry = store.append_feedback(early, hold_unknown=True).result()
    assert retry == replace(receipt, duplicate=True, state="stored")


def test_a_waiting_event_is_not_current(store: Store, make) -> None:
    event = make.event(completion_id=uuid7())
    store.append_feedback(event, hold_unknown=True).result()
    assert store.list_feedback(FeedbackFilter(current_only=True)) == []
    assert states(store) == ["pending"]


def test_a_ranking_waits_for_the_last_of_its_answers(store: Store, make) -> None:
    a, b = make.completion(), make.completion()
    event = make.event(judgement=Ranking(((a.completion_id,), (b.completion_id,))))
    store.append_feedback(event, hold_unknown=True).result()
    store.append_completion(a).result()
    assert states(store) == ["pending"]
    store.append_completion(b).result()
    assert states(store) == ["stored"]


def test_a_vote_waits_for_its_comparison_and_is_checked_then(store: Store, make, answered) -> None:
    a, b, c = (answered().completion_id for _ in range(3))
    blind = make.comparison(a, b)
    good = make.event(judgement=Ranking(((b,), (a,))), comparison_id=blind.comparison_id)
    forged = replace(good, feedback_id=uuid7(), rater_id="x", judgement=Ranking(((c,), (a,))))
    for event in (good, forged):
        store.append_feedback(event, hold_unknown=True).result()
    store.create_comparison(blind).result()
    assert states(store) == ["stored", "dead"]
    assert "not shown" in store.get_feedback(Scope(), forged.feedback_id).dead_reason
    assert store.next_questions(Scope()) == []


def test_an_answer_of_somebody_else_never_resolves_a_waiting_event(store: Store, make) -> None:
    theirs = make.completion(scope=Scope("other"))
    wrong_user = make.completion(end_user="bob")
    for completion in (theirs, wrong_user):
        event = make.event(completion_id=completion.completion_id)
        store.append_feedback(event, hold_unknown=True, owner="ann").result()
        store.append_completion(completion).result()
    assert states(store) == ["pending", "pending"]


def test_a_sweep_gives_up_old_events_only(store: Store, make) -> None:
    assert store.sweep_pending().result() == SweepReport(0, 0, 0)
    event = make.event(completion_id=uuid7())
    store.append_feedback(event, hold_unknown=True).result()
    assert store.sweep_pending().result() == SweepReport(0, 0, 1)
    time.sleep(0.01)
    assert store.sweep_pending(lifetime_ms=0).result() == SweepReport(0, 1, 0)
    dead = store.get_feedback(Scope(), event.feedback_id)
    assert (dead.state, dead.log_seq) == ("dead", None)
    assert "never appeared" in dead.dead_reason


def test_edits_and_retractions_may_arrive_before_what_they_name(
    store: Store, make, answered
) -> None:
    answer = answered().completion_id
    first = make.event(completion_id=answer)
    edit = make.event(completion_id=answer, judgement=Thumb(False), supersedes_id=first.feedback_id)
    with pytest.raises(NotFound):
        store.append_feedback(edit).result()
    store.append_feedback(edit, hold_unknown=True).result()
    store.append_feedback(first).result()
    current = store.list_feedback(FeedbackFilter(current_only=True))
    assert [stored.feedback_id for stored in current] == [edit.feedback_id]

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from heedful_store import (
    AlreadyExists,
    Completion,
    Correction,
    Critique,
    FeedbackFilter,
    Invalid,
    Label,
    NotFound,
    Ranking,
    Rating,
    Retraction,
    Scope,
    Store,
    Thumb,
    uuid7,
)
from heedful_store.feedback import prepare

Answered = Callable[..., Completion]
OTHER = Scope("other", "default")
CURRENT = FeedbackFilter(current_only=True)


def current_ids(store: Store) -> set[str]:
    return {stored.feedback_id for stored in store.list_feedback(CURRENT)}


@pytest.mark.parametrize(
    "judgement",
    [
        Thumb(False, ("too long", "ünïcode ✓")),
        Rating(7),
        Correction("better\nanswer"),
        Critique("vague", ("tone",)),
        Label({"hallucination": True, "harmful_advice": False}),
    ],
)
def test_each_kind_comes_back_as_it_was_sent(
    store: Store, make, answered: Answered, judgement
) -> None:
    answer = answered()
    event = make.event(
        judgement=judgement,
        completion_id=answer.completion_id,
        comment="by the way",
        tags=("x",),
        client_time_ms=5,
        consent_train=False,
        rater_kind="expert",
        source="cli",
        key_id="k",
    )
    receipt = store.append_feedback(event).result()
    assert (receipt.feedback_id, receipt.duplicate, receipt.state) == (
        event.feedback_id,
        False,
        "stored",
    )
    stored = store.get_feedback(event.scope, event.feedback_id)
    assert stored.event == event
    assert (stored.seq, stored.server_time_ms) == (receipt.seq, receipt.server_time_ms)


def test_a_ranking_keeps_ties_and_all_bad(store: Store, make, answered: Answered) -> None:
    a, b, c = (answered().completion_id for _ in range(3))
    event = make.event(judgement=Ranking(((b,), (a, c)), all_bad=True))
    store.append_feedback(event).result()
    assert store.get_feedback(event.scope, event.feedback_id).event == event


def test_a_repetition_gets_the_same_receipt_marked_duplicate(
    store: Store, make, answered: Answered
) -> None:
    event = make.event(completion_id=answered().completion_id)
    first = store.append_feedback(event).result()
    retry = replace(event, client_time_ms=999, source="http", key_id="another")
    assert store.append_feedback(retry).result() == replace(first, duplicate=True)
    assert len(store.list_feedback(FeedbackFilter())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"judgement": Thumb(False)},
        {"judgement": Thumb(True, ("why",))},
        {"rater_id": "bob"},
        {"rater_kind": "operator"},
        {"comment": "x"},
        {"tags": ("t",)},
        {"consent_train": False},
    ],
)
def test_the_same_id_with_another_payload_already_exists(
    store: Store, make, answered: Answered, change: dict[str, object]
) -> None:
    event = make.event(completion_id=answered().completion_id)
    store.append_feedback(event).result()
    with pytest.raises(AlreadyExists):
        store.append_feedback(replace(event, **change)).result()
    assert store.get_feedback(event.scope, event.feedback_id).event == event


def test_the_id_belongs_to_its_scope(store: Store, make, answered: Answered) -> None:
    event = make.event(completion_id=answered().completion_id)
    store.append_feedback(event).result()
    theirs = answered(scope=OTHER)
    foreign = make.event(
        feedback_id=event.feedback_id, scope=OTHER, completion_id=theirs.completion_id
    )
    assert store.append_feedback(foreign).result().duplicate is False
    with pytest.raises(NotFound):
        store.get_feedback(Scope("third"), event.feedback_id)


async def test_repetitions_and_clashes_inside_one_group(store: Store, make) -> None:
    answer = make.completion()
    await store.append_completion(answer)
    event = make.event(completion_id=answer.completion_id)
    clash = replace(event, judgement=Thumb(False))
    groups = store.stats.groups
    outcomes = await asyncio.gather(
        *[store.append_feedback(e) for e in (event, event, clash, event)], return_exceptions=True
    )
    assert store.stats.groups == groups + 1
    assert [getattr(o, "duplicate", type(o)) for o in outcomes] == [
        False,
        True,
        AlreadyExists,
        True,
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"feedback_id": "7"}, "feedback_id"),
        ({"feedback_id": "01A20662-1D04-79D1-99EC-2DA3B34C94C3"}, "feedback_id"),
        ({"feedback_id": "01a20662-1d04-49d1-99ec-2da3b34c94c3"}, "feedback_id"),
        ({"judgement": Rating(0)}, "rating.value"),
        ({"judgement": Rating(8)}, "rating.value"),
        ({"judgement": Correction(" \n")}, "correction.text"),
        ({"judgement": Critique("")}, "critique.text"),
        ({"judgement": Label({})}, "label.flags"),
        ({"judgement": Label({"rude": True})}, "label.flags"),
        ({"judgement": Ranking((("a",), ("a",))), "completion_id": None}, "ranking.groups"),
        ({"judgement": Ranking((("a",), ())), "completion_id": None}, "ranking.groups"),
        ({"judgement": Ranking((("a",),)), "completion_id": None}, "ranking.groups"),
        ({"judgement": Ranking((("a",), ("b",)))}, "completion_id"),
        ({"completion_id": None}, "completion_id"),
        ({"comparison_id": "c"}, "comparison_id"),
        ({"judgement": Retraction()}, "supersedes_id"),
        ({"judgement": Retraction(), "completion_id": None}, "supersedes_id"),
    ],
)
def test_a_broken_rule_names_its_field(make, fields: dict[str, object], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        prepare(make.event(**({"completion_id": "c"} | fields)))
    assert caught.value.field == field


def test_an_event_cannot_supersede_itself(make) -> None:
    name = uuid7()
    with pytest.raises(Invalid, match="another event"):
        prepare(make.event(feedback_id=name, supersedes_id=name, completion_id="c"))


def test_an_edit_replaces_and_a_retraction_ends_the_chain_for_good(
    store: Store, make, answered: Answered
) -> None:
    answer = answered().completion_id
    first = make.event(completion_id=answer)
    edit = make.event(completion_id=answer, judgement=Thumb(False), supersedes_id=first.feedback_id)
    for event in (first, edit):
        store.append_feedback(event).result()
    assert current_ids(store) == {edit.feedback_id}
    store.retract_feedback(first.scope, first.feedback_id, rater_id="ann").result()
    assert current_ids(store) == set()
    assert len(store.list_feedback(FeedbackFilter())) == 3


def test_a_second_opinion_replaces_the_first_without_naming_it(
    store: Store, make, answered: Answered
) -> None:
    answer = answered().completion_id
    events = [
        make.event(completion_id=answer, judgement=judgement, rater_id=rater)
        for judgement, rater in (
            (Thumb(True), "ann"),
            (Thumb(False), "ann"),
            (Rating(3), "ann"),
            (Thumb(True), "bob"),
            (Critique("too long"), "ann"),
            (Critique("too short"), "ann"),
        )
    ]
    for event in events:
        store.append_feedback(event).result()
    assert current_ids(store) == {event.feedback_id for event in events[1:]}


def test_what_was_replaced_does_not_come_back(store: Store, make, answered: Answered) -> None:
    answer = answered().completion_id
    first, second = make.event(completion_id=answer), make.event(completion_id=answer)
    for event in (first, second):
        store.append_feedback(event).result()
    store.retract_feedback(second.scope, second.feedback_id, rater_id="ann").result()
    assert current_ids(store) == set()


def test_edits_must_match_what_they_supersede(store: Store, make, answered: Answered) -> None:
    answer, another = answered().completion_id, answered().completion_id
    first = make.event(completion_id=answer)
    store.append_feedback(first).result()
    edit = make.event(completion_id=answer, supersedes_id=first.feedback_id)
    with pytest.raises(Invalid, match="another answer"):
        store.append_feedback(replace(edit, completion_id=another)).result()
    with pytest.raises(Invalid, match="another kind"):
        store.append_feedback(replace(edit, judgement=Rating(3))).result()
    with pytest.raises(NotFound):
        store.append_feedback(replace(edit, rater_id="bob")).result()
    with pytest.raises(NotFound):
        store.append_feedback(replace(edit, supersedes_id=uuid7())).result()
    with pytest.raises(NotFound):
        store.retract_feedback(first.scope, first.feedback_id, rater_id="bob").result()
    retraction = store.retract_feedback(first.scope, first.feedback_id, rater_id="ann").result()
    with pytest.raises(Invalid, match="final"):
        store.retract_feedback(first.scope, retraction.feedback_id, rater_id="ann").result()


def test_feedback_on_an_unknown_or_foreign_answer_is_refused(
    store: Store, make, answered: Answered
) -> None:
    mine, foreign = answered(end_user="bob"), answered(scope=OTHER)
    for name, owner in (
        (uuid7(), None),
        (foreign.completion_id, None),
        (mine.completion_id, "ann"),
    ):
        with pytest.raises(NotFound):
            store.append_feedback(make.event(completion_id=name), owner=owner).result()
    store.append_feedback(make.event(completion_id=mine.completion_id), owner="bob").result()
    assert len(store.list_feedback(FeedbackFilter())) == 1


def test_a_ranking_may_name_only_what_its_comparison_showed(
    store: Store, make, answered: Answered
) -> None:
    a, b, c = (answered().completion_id for _ in range(3))
    blind = make.comparison(a, b)
    store.create_comparison(blind).result()
    vote = make.event(judgement=Ranking(((a,), (c,))), comparison_id=blind.comparison_id)
    with pytest.raises(Invalid, match="not shown"):
        store.append_feedback(vote).result()
    assert store.next_questions(Scope()) == [blind]
    store.append_feedback(replace(vote, judgement=Ranking(((a, b),), all_bad=True))).result()
    assert store.next_questions(Scope()) == []


def test_lists_are_paged_and_narrowed(store: Store, make, answered: Answered) -> None:
    one, two = answered(policy_version="v1"), answered(policy_version="v2", end_user="zoe")
    events = [
        make.event(completion_id=one.completion_id, rater_id="r1", tags=("a",)),
        make.event(completion_id=two.completion_id, rater_id="r2", tags=("ab",)),
        make.event(judgement=Ranking(((one.completion_id,), (two.completion_id,)))),
        make.event(completion_id=one.completion_id, judgement=Rating(2), tags=('a"b%',)),
    ]
    seqs = [store.append_feedback(event).result().seq for event in events]

    def found(**fields: object) -> list[int]:
        criteria = FeedbackFilter(**fields)
        return [seqs.index(stored.seq) for stored in store.list_feedback(criteria)]

    assert found() == [0, 1, 2, 3]
    assert found(kinds=("rating", "ranking")) == [2, 3]
    assert found(rater_id="r2") == [1]
    assert found(completion_id=one.completion_id) == [0, 2, 3]
    assert found(policy_version="v2") == [1, 2]
    assert found(end_user="zoe") == [1, 2]
    assert found(tag="a") == [0]
    assert found(tag='a"b%') == [3]
    assert found(until_ms=0) == []
    assert found(scope=OTHER) == []
    page = store.list_feedback(FeedbackFilter(), after_seq=seqs[0], limit=2)
    assert [stored.seq for stored in page] == seqs[1:3]
    assert [s.seq for s in store.export_feedback(FeedbackFilter())] == seqs
    assert [s.log_seq for s in store.feedback_since(Scope(), seqs[1])] == seqs[2:]
    assert store.backlog(Scope(), seqs[1]) == 2


def test_an_export_crosses_pages(
    store: Store, make, answered: Answered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful_store.current.PAGE_ROWS", 3)
    answer = answered().completion_id
    acks = [
        store.append_feedback(make.event(completion_id=answer, rater_id=f"r{i}")) for i in range(7)
    ]
    seqs = [ack.result().seq for ack in acks]
    assert [stored.seq for stored in store.export_feedback(FeedbackFilter())] == seqs

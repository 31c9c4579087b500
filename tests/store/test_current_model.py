"""Duplicates, edits and retractions in any order, against a model that fits on a page."""

from dataclasses import dataclass

import pytest
from heedful_store import (
    Critique,
    FeedbackEvent,
    FeedbackFilter,
    Rejected,
    Retraction,
    Scope,
    Store,
    Thumb,
    uuid7,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine


@dataclass(frozen=True)
class Said:
    name: str
    rater: str
    kind: str
    target: str
    supersedes: str | None


class Model:
    """What the log means, told without any database."""

    def __init__(self) -> None:
        self.log: dict[str, Said] = {}

    def accept(self, said: Said) -> bool:
        old = self.log.get(said.supersedes or "")
        if said.name in self.log or old is None:
            self.log.setdefault(said.name, said)
            return True
        same = said.kind == "retraction" or (old.kind, old.target) == (said.kind, said.target)
        if old.rater != said.rater or old.kind == "retraction" or not same:
            return False
        self.log[said.name] = said
        return True

    def root(self, said: Said) -> str:
        while said.supersedes in self.log:
            said = self.log[said.supersedes]
        return said.supersedes or said.name

    def edited(self, said: Said) -> bool:
        key = (said.name, said.rater, said.kind, said.target)
        return any((x.supersedes, x.rater, x.kind, x.target) == key for x in self.log.values())

    def current(self) -> set[str]:
        ended = {(self.root(x), x.rater) for x in self.log.values() if x.kind == "retraction"}
        last: dict[object, str] = {}
        for said in self.log.values():
            if said.kind != "retraction" and not self.edited(said):
                slot = (said.rater, said.target, said.kind, said.kind == "critique" and said.name)
                last[slot] = said.name
        return {
            n for n in last.values() if (self.root(self.log[n]), self.log[n].rater) not in ended
        }


class Machine(RuleBasedStateMachine):
    """Writes events, and delivers each of them at any later time, more than once."""

    def __init__(self, store: Store, answers: list[str], scope: Scope) -> None:
        super().__init__()
        self.store, self.answers, self.scope = store, answers, scope
        self.model = Model()
        self.written: list[Said] = []

    def write(self, rater: str, kind: str, target: str, supersedes: str | None = None) -> None:
        self.written.append(Said(uuid7(), rater, kind, target, supersedes))

    @rule(
        rater=st.sampled_from(["ann", "bob"]),
        kind=st.sampled_from(["thumb", "critique"]),
        answer=st.integers(0, 1),
    )
    def judge(self, rater: str, kind: str, answer: int) -> None:
        self.write(rater, kind, self.answers[answer])

    @precondition(lambda self: self.written)
    @rule(data=st.data(), honest=st.sampled_from([True, True, True, False]))
    def edit(self, data: st.DataObject, honest: bool) -> None:
        old = data.draw(st.sampled_from(self.written))
        kind = old.kind if old.kind != "retraction" else "thumb"
        target = old.target or self.answers[0]
        self.write(old.rater if honest else "eve", kind, target, old.name)

    @precondition(lambda self: self.written)
    @rule(data=st.data(), honest=st.sampled_from([True, True, False]))
    def retract(self, data: st.DataObject, honest: bool) -> None:
        old = data.draw(st.sampled_from(self.written))
        self.write(old.rater if honest else "eve", "retraction", "", old.name)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        said = data.draw(st.sampled_from(self.written))
        repeated = said.name in self.model.log
        accepted = self.model.accept(said)
        try:
            receipt = self.store.append_feedback(self.event(said), hold_unknown=True).result()
        except Rejected:
            assert not accepted
        else:
            assert accepted
            assert receipt.duplicate == repeated
        self.compare()

    def event(self, said: Said) -> FeedbackEvent:
        judgement = {
            "thumb": Thumb(True),
            "critique": Critique(said.name),
            "retraction": Retraction(),
        }[said.kind]
        return FeedbackEvent(
            feedback_id=said.name,
            scope=self.scope,
            judgement=judgement,
            rater_id=said.rater,
            completion_id=said.target or None,
            supersedes_id=said.supersedes,
        )

    def compare(self) -> None:
        criteria = FeedbackFilter(scope=self.scope, current_only=True)
        found = [stored.feedback_id for stored in self.store.list_feedback(criteria, limit=999)]
        assert set(found) == self.model.current()
        assert len(found) == len(set(found))


@pytest.mark.timeout(180)
def test_any_order_of_duplicates_edits_and_retractions_agrees_with_the_model(
    store: Store, make
) -> None:
    def start() -> Machine:
        scope = Scope("default", uuid7())
        answers = [make.completion(scope=scope) for _ in range(2)]
        for answer in answers:
            store.append_completion(answer).result()
        return Machine(store, [answer.completion_id for answer in answers], scope)

    run_machine(
        start,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_a_strangers_retraction_that_came_first_takes_nothing_back(
    store: Store, make, answered
) -> None:
    event = make.event(completion_id=answered().completion_id)
    store.retract_feedback(Scope(), event.feedback_id, rater_id="eve", hold_unknown=True).result()
    store.append_feedback(event).result()
    found = store.list_feedback(FeedbackFilter(current_only=True))
    assert [stored.feedback_id for stored in found] == [event.feedback_id]


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_a_chain_means_the_same_in_every_order_of_arrival(
    store: Store, make, answered, order: tuple[int, ...]
) -> None:
    answer = answered().completion_id
    first = make.event(completion_id=answer)
    edit = make.event(completion_id=answer, supersedes_id=first.feedback_id)
    last = make.event(completion_id=answer, judgement=Thumb(False), supersedes_id=edit.feedback_id)
    chain = [first, edit, last]
    for place in (*order, *order):
        store.append_feedback(chain[place], hold_unknown=True).result()
    found = store.list_feedback(FeedbackFilter(current_only=True))
    assert [stored.feedback_id for stored in found] == [last.feedback_id]
    store.retract_feedback(Scope(), edit.feedback_id, rater_id="ann").result()
    assert store.list_feedback(FeedbackFilter(current_only=True)) == []

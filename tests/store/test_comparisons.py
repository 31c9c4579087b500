from dataclasses import replace

import pytest
from heedful_store import AlreadyExists, Candidate, Invalid, NotFound, Ranking, Scope, Store, uuid7


def test_a_comparison_keeps_order_shown_and_propensities(store: Store, make) -> None:
    blind = replace(
        make.comparison("a", "b", purpose="learn", tags=("t",)),
        candidates=(Candidate("b", "v2", 1, 0.25), Candidate("a", "v1", 0, 0.75)),
    )
    assert store.create_comparison(blind).result() is True
    assert store.get_comparison(Scope(), blind.comparison_id) == blind
    with pytest.raises(AlreadyExists):
        store.create_comparison(blind).result()


def test_a_foreign_comparison_looks_unknown(store: Store, make) -> None:
    blind = make.comparison("a", "b")
    store.create_comparison(blind).result()
    for scope, name in ((Scope("other"), blind.comparison_id), (Scope(), uuid7())):
        with pytest.raises(NotFound):
            store.get_comparison(scope, name)


@pytest.mark.parametrize(
    "candidates",
    [
        (Candidate("a", "v1", 0, 1.0),),
        (Candidate("a", "v1", 0, 0.5), Candidate("a", "v2", 1, 0.5)),
        (Candidate("a", "v1", 0, 0.5), Candidate("b", "v2", 0, 0.5)),
    ],
)
def test_a_set_that_is_none_is_refused(store: Store, make, candidates) -> None:
    with pytest.raises(Invalid):
        store.create_comparison(make.comparison(candidates=candidates))


def test_the_oldest_unanswered_comes_first(store: Store, make, answered) -> None:
    names = [answered().completion_id for _ in range(2)]
    blinds = [make.comparison(*names, created_at_ms=at_ms) for at_ms in (30, 10, 20)]
    blinds.append(make.comparison(*names, created_at_ms=5, scope=Scope("other")))
    blinds.append(make.comparison(*names, created_at_ms=6, end_user="bob"))
    for blind in blinds:
        store.create_comparison(blind).result()
    assert store.next_questions(Scope(), end_user="ann") == [blinds[1]]
    assert store.next_questions(Scope(), limit=9) == [blinds[4], blinds[1], blinds[2], blinds[0]]
    vote = make.event(
        judgement=Ranking(((names[0],), (names[1],))), comparison_id=blinds[1].comparison_id
    )
    store.append_feedback(vote).result()
    assert store.next_questions(Scope(), end_user="ann") == [blinds[2]]


def test_a_retracted_vote_does_not_make_its_comparison_blind_again(
    store: Store, make, answered
) -> None:
    a, b = (answered().completion_id for _ in range(2))
    blind = make.comparison(a, b)
    store.create_comparison(blind).result()
    vote = make.event(judgement=Ranking(((a,), (b,))), comparison_id=blind.comparison_id)
    receipt = store.append_feedback(vote).result()
    store.retract_feedback(Scope(), vote.feedback_id, rater_id="ann").result()
    found = store.get_comparison(Scope(), blind.comparison_id)
    assert found.voted_at_ms == receipt.server_time_ms
    assert store.next_questions(Scope()) == []

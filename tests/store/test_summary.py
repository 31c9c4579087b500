from datetime import UTC, datetime

from heedful_store import Critique, FeedbackFilter, Ranking, Scope, Store, Thumb, now_ms
from heedful_store.summary import iso_week


def test_the_summary_counts_what_is_current(store: Store, make, answered) -> None:
    one = answered(policy_version="v1", tags=("fr",), payload=make.payload("first prompt"))
    two = answered(policy_version="v2", payload=make.payload("second prompt"))
    thumbs = [
        (one, "ann", True, ()),
        (one, "bob", False, ("too long",)),
        (one, "zoe", False, ("too long", "rude")),
        (two, "ann", True, ()),
        (two, "ann", False, ()),  # replaces the one before
    ]
    for answer, rater, up, reasons in thumbs:
        event = make.event(
            completion_id=answer.completion_id,
            rater_id=rater,
            judgement=Thumb(up, reasons),
            tags=("web",) if rater == "bob" else (),
        )
        store.append_feedback(event).result()
    critique = make.event(completion_id=two.completion_id, judgement=Critique("x", ("rude",)))
    store.append_feedback(critique).result()
    summary = store.summary(FeedbackFilter())
    assert (summary.events, summary.raters) == (5, 3)
    assert summary.by_kind == {"thumb": 4, "critique": 1}
    counts = {name: (a.up, a.down) for name, a in summary.by_policy.items()}
    assert counts == {"v1": (1, 2), "v2": (0, 1)}
    tags = {name: (a.up, a.down) for name, a in summary.by_tag.items()}
    assert tags == {"fr": (1, 2), "web": (0, 1)}
    assert list(summary.by_week) == [iso_week(now_ms())]
    assert summary.approval.share == 0.25
    assert sorted(summary.reasons) == [("rude", 2), ("too long", 2)]
    worst = [(p.excerpt, p.approval.up, p.approval.down) for p in summary.worst_prompts]
    assert worst == [("first prompt", 1, 2), ("second prompt", 0, 1)]
    # Of ann-bob, ann-zoe and bob-zoe only the last pair agrees.
    assert (summary.thumb_agreement.pairs, summary.thumb_agreement.agreeing) == (3, 1)
    assert summary.ranking_agreement.share is None


def test_agreement_on_rankings_counts_strict_pairs(store: Store, make, answered) -> None:
    a, b, c = (answered().completion_id for _ in range(3))
    for rater, groups in (
        ("r1", ((a,), (b,), (c,))),
        ("r2", ((a, b), (c,))),
        ("r3", ((c,), (b,), (a,))),
    ):
        store.append_feedback(make.event(judgement=Ranking(groups), rater_id=rater)).result()
    agreement = store.summary(FeedbackFilter()).ranking_agreement
    # r1-r2: ac, bc agree, ab is a tie. r1-r3: three against. r2-r3: ac, bc against.
    assert (agreement.pairs, agreement.agreeing) == (7, 2)


def test_an_empty_log_has_a_summary(store: Store) -> None:
    summary = store.summary(FeedbackFilter(scope=Scope("nobody")))
    assert (summary.events, summary.approval.share, summary.worst_prompts) == (0, 0.0, [])


def test_a_week_belongs_to_the_year_of_its_thursday() -> None:
    new_year = int(datetime(2027, 1, 1, tzinfo=UTC).timestamp() * 1000)
    assert iso_week(new_year) == "2026-W53"

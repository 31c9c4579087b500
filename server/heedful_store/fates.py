"""Each event with its answers and its fate: the trainer's view of the log, and GetFeedback's.

Owns the gathering of what ``eligibility`` decides on, in one pass by ``seq`` so that caps fall on
the same events for every reader. It decides nothing itself. Reads only, any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, and_, func, select

from heedful_store import completions as completion_log
from heedful_store import current
from heedful_store.eligibility import Counts, Fate, Profile, RunUse, Standing, fate_of
from heedful_store.judgements import Ranking, ranked_ids
from heedful_store.records import Completion, FeedbackFilter, Scope, StoredFeedback
from heedful_store.registry_schema import deployments, run_inputs, runs
from heedful_store.schema import feedback

# Answers come with their payloads, so a page is smaller than a page of bare events.
_PAGE_ROWS = 200


@dataclass(frozen=True, slots=True)
class Judged:
    """One current event, ready for a dataset."""

    feedback: StoredFeedback  # what was said
    answers: tuple[Completion, ...]  # about what; a ranking's in the order of its groups
    fate: Fate  # may it be learned from


@dataclass(slots=True)
class _Tally:
    """What raters have contributed up to a place in the log."""

    events: int
    raters: int
    by_rater: Counter[str] = field(default_factory=Counter)
    on_prompt: Counter[tuple[str, str]] = field(default_factory=Counter)

    def judge(
        self,
        stored: StoredFeedback,
        standing: Standing,
        answers: Sequence[Completion],
        profile: Profile,
    ) -> Fate:
        rater = stored.event.rater_id if stored.event is not None else ""
        prompt = (rater, answers[0].prompt_hash if answers else "")
        counts = Counts(self.on_prompt[prompt], self.by_rater[rater], self.events, self.raters)
        fate = fate_of(stored, standing, answers, profile, counts)
        if fate.trainable:
            self.by_rater[rater] += 1
            self.on_prompt[prompt] += 1
        return fate


def iterate(read: current.Read, scope: Scope, profile: Profile) -> Iterator[Judged]:
    """Yield every current event with its answers and fate, in short transactions of one page."""
    criteria = FeedbackFilter(scope=scope, current_only=True, states=("stored",))
    with read() as connection:
        tally = _start_tally(connection, scope)
    after_seq = 0
    while True:
        with read() as connection:
            page = current.find(connection, criteria, after_seq=after_seq, limit=_PAGE_ROWS)
            answers = _answers(connection, scope, page)
        for stored, about in zip(page, answers, strict=True):
            yield Judged(stored, about, tally.judge(stored, "current", about, profile))
        if len(page) < _PAGE_ROWS:
            return
        after_seq = page[-1].seq


def fate_of_event(connection: Connection, scope: Scope, feedback_id: str, profile: Profile) -> Fate:
    """Return the fate of one event, with the runs that used it; raise NotFound."""
    stored = current.get(connection, scope, feedback_id)
    standing = _standing(connection, stored.seq)
    tally = _start_tally(connection, scope)
    if stored.event is not None and standing == "current":
        _replay_rater(connection, scope, stored, profile, tally)
    answers = _answers(connection, scope, [stored])[0]
    fate = tally.judge(stored, standing, answers, profile)
    return replace(fate, uses=_uses(connection, scope, stored.seq))


def _replay_rater(
    connection: Connection, scope: Scope, stored: StoredFeedback, profile: Profile, tally: _Tally
) -> None:
    """Count what this event's rater contributed before it, exactly as ``iterate`` would."""
    assert stored.event is not None
    criteria = FeedbackFilter(
        scope=scope, rater_id=stored.event.rater_id, current_only=True, states=("stored",)
    )
    after_seq = 0
    while True:
        page = current.find(connection, criteria, after_seq=after_seq, limit=_PAGE_ROWS)
        for earlier, about in zip(page, _answers(connection, scope, page), strict=True):
            if earlier.seq >= stored.seq:
                return
            tally.judge(earlier, "current", about, profile)
        if len(page) < _PAGE_ROWS:
            return
        after_seq = page[-1].seq


def _start_tally(connection: Connection, scope: Scope) -> _Tally:
    f = feedback.c
    counts = select(func.count(), func.count(func.nullif(f.rater_id, "").distinct())).where(
        f.tenant == scope.tenant, f.project == scope.project, current.is_current(feedback)
    )
    events, raters = connection.execute(counts.select_from(feedback)).one()
    return _Tally(events, raters)


def _standing(connection: Connection, seq: int) -> Standing:
    f = feedback
    query = select(current.is_retracted(f), current.is_superseded(f)).where(f.c.seq == seq)
    retracted, superseded = connection.execute(query).one()
    if retracted:
        return "retracted"
    return "superseded" if superseded else "current"


def _answers(
    connection: Connection, scope: Scope, page: Sequence[StoredFeedback]
) -> list[tuple[Completion, ...]]:
    """Return the logged answers of each event of a page."""
    names = [_completion_ids(stored) for stored in page]
    wanted = {name for group in names for name in group}
    found = completion_log.get_many(connection, scope, wanted) if wanted else {}
    return [tuple(found[name] for name in group if name in found) for group in names]


def _completion_ids(stored: StoredFeedback) -> tuple[str, ...]:
    event = stored.event
    if event is None:
        return ()
    if isinstance(event.judgement, Ranking):
        return ranked_ids(event.judgement)
    return (event.completion_id,) if event.completion_id is not None else ()


def _uses(connection: Connection, scope: Scope, seq: int) -> tuple[RunUse, ...]:
    promoted = (
        select(func.min(deployments.c.at_ms))
        .where(
            deployments.c.tenant == scope.tenant,
            deployments.c.project == scope.project,
            deployments.c.action == "promote",
            deployments.c.version == runs.c.policy_version,
        )
        .scalar_subquery()
    )
    query = (
        select(
            runs.c.run_id, runs.c.dataset_id, run_inputs.c.split, runs.c.policy_version, promoted
        )
        .join(
            runs,
            and_(
                runs.c.run_id == run_inputs.c.run_id,
                runs.c.tenant == scope.tenant,
                runs.c.project == scope.project,
            ),
        )
        .where(run_inputs.c.feedback_seq == seq)
        .order_by(runs.c.created_at_ms)
    )
    return tuple(RunUse(*row) for row in connection.execute(query))

"""Feedback in numbers for people: approval, reasons, worst prompts, agreement between raters.

Owns the counting, over current events that match a filter. It does not decide what is trainable,
and draws no conclusions. Reads only, any thread; one pass, memory grows with the distinct prompts
and judged answers, not with the length of the texts.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations

from sqlalchemy import Connection, select

from heedful_store import current
from heedful_store.judgements import Critique, Ranking, Thumb
from heedful_store.records import FeedbackFilter, Scope, StoredFeedback
from heedful_store.schema import completion_payloads, completions

_TOP = 10
_EXCERPT_CHARS = 200
_PAGE_ROWS = 500


@dataclass(slots=True)
class Approval:
    """Thumbs of one group."""

    up: int = 0
    down: int = 0

    @property
    def share(self) -> float:
        """Return the share of thumbs that point up; 0 without any."""
        total = self.up + self.down
        return self.up / total if total else 0.0


@dataclass(slots=True)
class Agreement:
    """How often two raters of the same thing said the same."""

    pairs: int = 0  # compared
    agreeing: int = 0  # of those

    @property
    def share(self) -> float | None:
        """Return the share that agrees, or None where nothing was rated twice."""
        return self.agreeing / self.pairs if self.pairs else None


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One prompt and the thumbs on its answers."""

    prompt_hash: str
    approval: Approval
    excerpt: str  # beginning of the prompt; empty when its text is gone


@dataclass(slots=True)
class Summary:
    """Counts over current events."""

    events: int = 0
    raters: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    approval: Approval = field(default_factory=Approval)
    by_policy: dict[str, Approval] = field(default_factory=lambda: defaultdict(Approval))
    by_tag: dict[str, Approval] = field(default_factory=lambda: defaultdict(Approval))
    by_week: dict[str, Approval] = field(default_factory=lambda: defaultdict(Approval))
    reasons: list[tuple[str, int]] = field(default_factory=list)  # commonest first
    worst_prompts: list[PromptScore] = field(default_factory=list)  # most thumbs down first
    thumb_agreement: Agreement = field(default_factory=Agreement)
    ranking_agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True, slots=True)
class _Answer:
    policy_version: str
    prompt_hash: str
    tags: tuple[str, ...]


@dataclass(slots=True)
class _Gathered:
    raters: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, Approval] = field(default_factory=lambda: defaultdict(Approval))
    thumbs: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    rankings: dict[frozenset[str], list[dict[str, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )


def summarise(connection: Connection, criteria: FeedbackFilter) -> Summary:
    """Count the current events that match."""
    summary, gathered = Summary(), _Gathered()
    criteria = replace(criteria, current_only=True, states=("stored",))
    after_seq = 0
    while True:
        page = current.find(connection, criteria, after_seq=after_seq, limit=_PAGE_ROWS)
        answers = _answers(connection, criteria.scope, page)
        for stored in page:
            _count(summary, gathered, stored, answers)
        if len(page) < _PAGE_ROWS:
            break
        after_seq = page[-1].seq
    summary.raters = len(gathered.raters - {""})
    summary.reasons = gathered.reasons.most_common(_TOP)
    summary.worst_prompts = _worst(connection, criteria.scope, gathered.prompts)
    summary.thumb_agreement = _thumb_agreement(gathered.thumbs)
    summary.ranking_agreement = _ranking_agreement(gathered.rankings)
    return summary


def iso_week(time_ms: int) -> str:
    """Return the ISO week of a time (UTC), such as "2026-W47"."""
    year, week, _ = datetime.fromtimestamp(time_ms / 1000, UTC).isocalendar()
    return f"{year}-W{week:02d}"


def _count(
    summary: Summary, gathered: _Gathered, stored: StoredFeedback, answers: dict[str, _Answer]
) -> None:
    event = stored.event
    assert event is not None, "a current event was not erased"
    summary.events += 1
    gathered.raters.add(event.rater_id)
    judgement = event.judgement
    summary.by_kind[_kind_name(judgement)] += 1
    if isinstance(judgement, Critique):
        gathered.reasons.update(judgement.aspects)
    if isinstance(judgement, Ranking):
        places = {n: place for place, group in enumerate(judgement.groups) for n in group}
        gathered.rankings[frozenset(places)].append(places)
    if not isinstance(judgement, Thumb):
        return
    gathered.reasons.update(judgement.reasons)
    gathered.thumbs[event.completion_id or ""].append(judgement.up)
    answer = answers.get(event.completion_id or "")
    groups = [summary.approval, summary.by_week[iso_week(stored.server_time_ms)]]
    tags = set(event.tags)
    if answer is not None:
        groups.append(summary.by_policy[answer.policy_version])
        tags.update(answer.tags)
        if answer.prompt_hash:
            groups.append(gathered.prompts[answer.prompt_hash])
    groups.extend(summary.by_tag[tag] for tag in tags)
    for approval in groups:
        approval.up += judgement.up
        approval.down += not judgement.up


def _kind_name(judgement: object) -> str:
    return type(judgement).__name__.lower()


def _answers(
    connection: Connection, scope: Scope, page: list[StoredFeedback]
) -> dict[str, _Answer]:
    names = {s.event.completion_id for s in page if s.event is not None} - {None}
    c = completions.c
    query = select(c.completion_id, c.policy_version, c.prompt_hash, c.tags).where(
        c.completion_id.in_(names), c.tenant == scope.tenant, c.project == scope.project
    )
    return {
        row[0]: _Answer(row[1], row[2], tuple(json.loads(row[3])))
        for row in connection.execute(query)
    }


def _worst(connection: Connection, scope: Scope, prompts: dict[str, Approval]) -> list[PromptScore]:
    disliked = [item for item in prompts.items() if item[1].down]
    disliked.sort(key=lambda item: (-item[1].down, item[1].up, item[0]))
    return [
        PromptScore(name, approval, _excerpt(connection, scope, name))
        for name, approval in disliked[:_TOP]
    ]


def _excerpt(connection: Connection, scope: Scope, prompt_hash: str) -> str:
    c = completions.c
    query = (
        select(completion_payloads.c.prompt_text)
        .join(completions, c.completion_id == completion_payloads.c.completion_id)
        .where(c.tenant == scope.tenant, c.project == scope.project, c.prompt_hash == prompt_hash)
        .limit(1)
    )
    text = connection.execute(query).scalar_one_or_none()
    return (text or "")[:_EXCERPT_CHARS]


def _thumb_agreement(thumbs: dict[str, list[bool]]) -> Agreement:
    total = Agreement()
    for votes in thumbs.values():
        up, down = sum(votes), len(votes) - sum(votes)
        total.pairs += len(votes) * (len(votes) - 1) // 2
        total.agreeing += up * (up - 1) // 2 + down * (down - 1) // 2
    return total


def _ranking_agreement(rankings: dict[frozenset[str], list[dict[str, int]]]) -> Agreement:
    """Count pairs of answers that two raters both put in a strict order."""
    total = Agreement()
    for votes in rankings.values():
        for one, other in combinations(votes, 2):
            for a, b in combinations(sorted(one), 2):
                product = (one[a] - one[b]) * (other[a] - other[b])
                total.pairs += product != 0
                total.agreeing += product > 0
    return total

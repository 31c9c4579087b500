"""Blind votes between two versions: wins, losses, ties, by rater and by prompt.

Owns the counting over the log, and the interval that goes with it. Such an interval describes the
votes that there are; it proves nothing about future ones, since nobody fixed beforehand how many
there would be. Reads only, in worker threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from heedful_store import Ranking, Scope, Store
from heedful_store import current as current_view
from heedful_store.judgements import decode
from heedful_store.records import Purpose
from heedful_store.schema import comparison_candidates, comparisons, completions, feedback
from sqlalchemy import Connection, select

from heedful_server.deployment.probation import wilson

NOTE = "counts of the votes so far; not a proof"


@dataclass(frozen=True, slots=True)
class Vote:
    """One rater's word on one pair: 1 for the version, -1 for the other, 0 for neither."""

    rater_id: str
    prompt_hash: str
    outcome: int


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes on a pair of versions."""

    version: str
    other: str
    wins: int = 0  # votes for the version
    losses: int = 0  # votes for the other
    ties: int = 0  # votes for neither
    raters: int = 0  # different ones; anonymous ones count as one
    prompts: int = 0  # different ones
    raters_for: int = 0  # raters with more wins than losses
    raters_against: int = 0

    @property
    def total(self) -> int:
        """How many votes there are."""
        return self.wins + self.losses + self.ties

    @property
    def win_rate(self) -> float | None:
        """The share of votes for the version, ties counted half; None without votes."""
        return (self.wins + self.ties / 2) / self.total if self.total else None

    def to_json(self) -> dict[str, object]:
        """Return plain values, as the evidence of the stage canary."""
        interval = list(wilson(self.win_rate or 0.0, self.total))
        return {**asdict(self), "win_rate": self.win_rate, "interval": interval, "note": NOTE}


def count_votes(
    store: Store, scope: Scope, version: str, other: str, purposes: Sequence[Purpose] = ("gate",)
) -> Votes:
    """Return what raters said in blind comparisons of two versions."""
    with store.read() as connection:
        votes = list(_read(connection, scope, version, other, purposes))
    return tally(version, other, votes)


def tally(version: str, other: str, votes: Iterable[Vote]) -> Votes:
    """Add votes up."""
    votes = list(votes)
    by_rater: dict[str, int] = defaultdict(int)
    for vote in votes:
        by_rater[vote.rater_id] += vote.outcome
    return Votes(
        version=version,
        other=other,
        wins=sum(vote.outcome > 0 for vote in votes),
        losses=sum(vote.outcome < 0 for vote in votes),
        ties=sum(vote.outcome == 0 for vote in votes),
        raters=len(by_rater),
        prompts=len({vote.prompt_hash for vote in votes}),
        raters_for=sum(net > 0 for net in by_rater.values()),
        raters_against=sum(net < 0 for net in by_rater.values()),
    )


def _read(
    connection: Connection, scope: Scope, version: str, other: str, purposes: Sequence[Purpose]
) -> Iterator[Vote]:
    if version == other:
        return
    shown = _candidates(connection, scope, version, other, purposes)
    query = (
        select(feedback.c.comparison_id, feedback.c.rater_id, feedback.c.value)
        .join(comparisons, comparisons.c.comparison_id == feedback.c.comparison_id)
        .where(
            feedback.c.tenant == scope.tenant,
            feedback.c.project == scope.project,
            feedback.c.kind == "ranking",
            comparisons.c.purpose.in_(purposes),
            current_view.is_current(feedback),
        )
    )
    for row in connection.execute(query):
        sides = shown.get(row.comparison_id)
        if sides is None:
            continue
        ranking = decode("ranking", row.value, None)
        if not isinstance(ranking, Ranking):
            continue  # emptied by an erasure
        outcome = _outcome(ranking, sides.answers_of(version), sides.answers_of(other))
        if outcome is not None:
            yield Vote(row.rater_id, sides.prompt_hash, outcome)


@dataclass(frozen=True, slots=True)
class _Sides:
    """Whose answers a comparison showed."""

    prompt_hash: str
    versions: dict[str, str]  # by completion

    def answers_of(self, version: str) -> set[str]:
        return {name for name, of in self.versions.items() if of == version}


def _candidates(
    connection: Connection, scope: Scope, version: str, other: str, purposes: Sequence[Purpose]
) -> dict[str, _Sides]:
    """Return the comparisons that showed answers of both."""
    c = comparison_candidates.c
    query = (
        select(c.comparison_id, c.completion_id, c.policy_version, completions.c.prompt_hash)
        .join(comparisons, comparisons.c.comparison_id == c.comparison_id)
        .outerjoin(completions, completions.c.completion_id == c.completion_id)
        .where(
            comparisons.c.tenant == scope.tenant,
            comparisons.c.project == scope.project,
            comparisons.c.purpose.in_(purposes),
            comparisons.c.voted_at_ms.is_not(None),
            c.policy_version.in_([version, other]),
        )
    )
    found: dict[str, _Sides] = {}
    for row in connection.execute(query):
        sides = found.setdefault(row.comparison_id, _Sides(row.prompt_hash or "", {}))
        sides.versions[row.completion_id] = row.policy_version
    return {name: s for name, s in found.items() if len(set(s.versions.values())) == 2}


def _outcome(ranking: Ranking, mine: set[str], others: set[str]) -> int | None:
    """Return who of the two stands higher; None where the ranking does not say."""
    if ranking.all_bad:
        return 0
    places = {name: i for i, group in enumerate(ranking.groups) for name in group}
    mean = [
        sum(places[name] for name in side) / len(side)
        for side in (mine & places.keys(), others & places.keys())
        if side
    ]
    if len(mean) < 2:
        return None
    return (mean[0] < mean[1]) - (mean[0] > mean[1])

"""What feedback is about: is the answer or comparison there, is it the rater's to judge.

Owns the lookup of completions and comparisons on behalf of events, and the mark that a comparison
was voted on. A target that is erased, or that belongs to another tenant, project or (where the
caller says so) end user, looks like one that does not exist. It does not number or store events.
Writer's thread only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import Connection, update

from heedful_store import bulk
from heedful_store.errors import Invalid
from heedful_store.records import Scope
from heedful_store.schema import comparisons


@dataclass(frozen=True, slots=True)
class Target:
    """What one event is about."""

    scope: Scope  # the event's
    completion_ids: tuple[str, ...] = ()  # the answer judged, or those ranked
    comparison_id: str | None = None  # the blind set
    owner: str | None = None  # must be this end user's; None: anybody's


class _Place(NamedTuple):
    tenant: str
    project: str
    end_user: str


@dataclass(frozen=True, slots=True)
class Visible:
    """The targets that were found."""

    completions: dict[str, _Place] = field(default_factory=dict)
    comparisons: dict[str, _Place] = field(default_factory=dict)
    shown: dict[str, set[str]] = field(default_factory=dict)  # completion ids by comparison

    def admits(self, target: Target) -> bool:
        """Say whether the target is there for this event.

        Raises Invalid where a ranking names an answer that its comparison did not show.
        """
        if target.comparison_id is None:
            places = [self.completions.get(name) for name in target.completion_ids]
            return all(_is_mine(place, target) for place in places)
        if not _is_mine(self.comparisons.get(target.comparison_id), target):
            return False
        if not self.shown[target.comparison_id].issuperset(target.completion_ids):
            raise Invalid("ranking.groups", "names a completion that was not shown")
        return True


def look_up(connection: Connection, targets: Collection[Target]) -> Visible:
    """Find the targets of a group of events with one query per table."""
    visible = Visible()
    sets = {target.comparison_id for target in targets if target.comparison_id is not None}
    singles = {
        name for target in targets if target.comparison_id is None for name in target.completion_ids
    }
    place = "tenant, project, end_user, erased_at_ms"
    for name, tenant, project, end_user, erased_at_ms in bulk.select_by_name(
        connection, f"completion_id, {place}", "completions", "completion_id", singles
    ):
        # Nothing new may be said about what a forgotten person was told.
        if erased_at_ms is None:
            visible.completions[name] = _Place(tenant, project, end_user)
    for name, tenant, project, end_user, erased_at_ms in bulk.select_by_name(
        connection, f"comparison_id, {place}", "comparisons", "comparison_id", sets
    ):
        if erased_at_ms is None:
            visible.comparisons[name] = _Place(tenant, project, end_user)
            visible.shown[name] = set()
    for name, completion_id in bulk.select_by_name(
        connection,
        "comparison_id, completion_id",
        "comparison_candidates",
        "comparison_id",
        visible.shown,
    ):
        visible.shown[name].add(completion_id)
    return visible


def mark_voted(connection: Connection, comparison_ids: Sequence[str], at_ms: int) -> None:
    """Note the first vote; a later retraction does not undo it, the versions being known."""
    connection.execute(
        update(comparisons)
        .where(comparisons.c.comparison_id.in_(comparison_ids), comparisons.c.voted_at_ms.is_(None))
        .values(voted_at_ms=at_ms)
    )


def _is_mine(place: _Place | None, target: Target) -> bool:
    if place is None:
        return False
    if place.tenant != target.scope.tenant or place.project != target.scope.project:
        return False
    return target.owner is None or target.owner == place.end_user

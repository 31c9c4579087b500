"""What people left in the project's log that an evaluation may use.

Owns who counts as a person (judges that are programs and simulated raters do not), how a vote on a
pair is read, and which prompts neither policy can have learned from. The log is read by gRPC, as
any client with the right to does. Event loop.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import heedful
from heedful.feedback_types import FeedbackKind

from heedful_trainer.dataset.splits import cluster_of

SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class Vote:
    """One person's word on answers of both: 1 for the version, 0 for the baseline, or a half."""

    rater: str
    prompt: str
    outcome: float


def is_person(event: heedful.Event) -> bool:
    """Return whether somebody judged, and not a program."""
    program = event.rater_kind == "judge" or event.rater_id.startswith(f"{SIMULATED}:")
    return not program and SIMULATED not in event.tags


async def read(
    client: heedful.AsyncClient, kinds: Sequence[FeedbackKind], *, completions: bool
) -> AsyncIterator[heedful.ExportedFeedback]:
    """Yield the current judgements of some kinds, oldest first.

    Raises:
        HeedfulError: the log cannot be read.
    """
    found = client.export_feedback(
        kinds=kinds, current_only=True, include_completions=completions, timeout_s=math.inf
    )
    async for item in found:
        if item.record.event.judgement is not None:  # else a retraction, or erased
            yield item


def vote_of(item: heedful.ExportedFeedback, version: str, baseline: str) -> Vote | None:
    """Return a ranking as a vote between two policies, None where it does not compare them."""
    ranking = item.record.event.judgement
    if not isinstance(ranking, heedful.Ranking) or not item.record.event.comparison_id:
        return None
    places = {name: place for place, group in enumerate(ranking.groups) for name in group}
    by_policy: dict[str, list[int]] = {version: [], baseline: []}
    for logged in item.completions:
        place = places.get(logged.completion.completion_id)
        policy = logged.served_by.policy_version
        if place is not None and policy in by_policy:
            by_policy[policy].append(place)
    ours, theirs = by_policy[version], by_policy[baseline]
    if not ours or not theirs:
        return None
    lead = sum(theirs) / len(theirs) - sum(ours) / len(ours)  # a better answer's place is lower
    outcome = 0.5 if ranking.all_bad or lead == 0 else float(lead > 0)
    return Vote(item.record.event.rater_id, _prompt(item.completions[0]), outcome)


async def held_out_prompts(
    client: heedful.AsyncClient, since: datetime | None, limit: int
) -> list[tuple[int, ...]]:
    """Return the newest prompts that were first asked after `since`, each once, as token ids.

    Args:
        client: of the project.
        since: when the later of both policies was made; None where neither was trained.
        limit: most prompts.

    Raises:
        HeedfulError: the log cannot be read.
    """
    before: set[str] = set()
    after: dict[str, tuple[int, ...]] = {}
    kinds: tuple[FeedbackKind, ...] = (
        *("thumb", "rating", "ranking"),
        *("correction", "critique", "label"),
    )
    async for item in read(client, kinds, completions=True):
        for logged in item.completions[:1]:
            cluster = _prompt(logged)
            if since is not None and (logged.created is None or logged.created <= since):
                before.add(cluster)
            elif logged.prompt_token_ids:
                after.setdefault(cluster, logged.prompt_token_ids)
    fresh = [ids for cluster, ids in after.items() if cluster not in before]
    return fresh[-limit:]


def _prompt(logged: heedful.LoggedCompletion) -> str:
    if not logged.prompt_text:
        return str(logged.prompt_token_ids)
    return cluster_of("", logged.prompt_text)

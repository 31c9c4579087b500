"""Which open comparison would teach most: the one on which the reward model's heads disagree.

Owns the scoring of open comparisons in the background, in bounded batches, and the memory of the
outcomes, which is this process's own. Scoring happens only while a reward model is loaded, at the
priority of background work, and one batch at a time. Event loop; the store is read in threads.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Sequence

import structlog
from heedful_store import Comparison, Completion, Scope, Store, StoreError

from heedful_server.deployment.door import PolicyDoor
from heedful_server.errors import HeedfulServerError
from heedful_server.feedback import queries
from heedful_server.protocol import PRIORITY_BACKGROUND, ScoreItem
from heedful_server.rpc.scorer import Scorer

log = structlog.get_logger(__name__)

_MOST_REMEMBERED = 4096
_BATCH_COMPARISONS = 8
_DEADLINE_S = 60.0


class Uncertainty:
    """What the reward heads think of open comparisons."""

    def __init__(self, store: Store, scorer: Scorer, door: PolicyDoor, base_id: str) -> None:
        self._store = store
        self._scorer = scorer
        self._door = door
        self._base_id = base_id
        # By comparison: the reward model and what it said, for scores of other heads say nothing.
        self._scores: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._tasks: dict[Scope, asyncio.Task[None]] = {}

    def most_uncertain(self, comparison_ids: Sequence[str]) -> str:
        """Return the one that the heads disagree on most; the first while none is scored."""
        scored = [name for name in comparison_ids if name in self._scores]
        if not scored:
            return comparison_ids[0]
        return max(scored, key=lambda name: self._scores[name][1])

    def look_at(self, scope: Scope) -> None:
        """Begin to score the open comparisons of a project, unless that is under way."""
        reward = self._door.directory.reward_model(scope)
        if reward is None or not self._door.residency.is_loaded(reward) or scope in self._tasks:
            return
        task = asyncio.create_task(self._score(scope, reward.adapter_id), name="uncertainty")
        self._tasks[scope] = task
        task.add_done_callback(lambda _: self._tasks.pop(scope))

    async def _score(self, scope: Scope, reward_id: str) -> None:
        try:
            found = await asyncio.to_thread(self._unscored, scope, reward_id)
            for start in range(0, len(found), _BATCH_COMPARISONS):
                await self._score_batch(scope, reward_id, found[start : start + _BATCH_COMPARISONS])
        except (HeedfulServerError, StoreError) as error:
            log.debug("open comparisons are not scored", reason=str(error))

    async def _score_batch(
        self, scope: Scope, reward_id: str, batch: list[tuple[str, list[ScoreItem]]]
    ) -> None:
        items = [item for _, group in batch for item in group]
        heads = await self._scorer.heads(scope, items, PRIORITY_BACKGROUND, _DEADLINE_S)
        rest = iter(heads)
        for comparison_id, group in batch:
            rewards = list(itertools.islice(rest, len(group)))
            self._scores[comparison_id] = (reward_id, disagreement(rewards))
        while len(self._scores) > _MOST_REMEMBERED:
            self._scores.popitem(last=False)

    def _unscored(self, scope: Scope, reward_id: str) -> list[tuple[str, list[ScoreItem]]]:
        with self._store.read() as connection:
            ids, _ = queries.open_questions(connection, scope, None)
        found = []
        for comparison_id in ids:
            if self._scores.get(comparison_id, ("", 0.0))[0] != reward_id:
                comparison = self._store.get_comparison(scope, comparison_id)
                if items := self._items(comparison):
                    found.append((comparison_id, items))
        return found

    def _items(self, comparison: Comparison) -> list[ScoreItem]:
        """Return what to score; nothing where an answer is gone, empty or of another base."""
        ids = [candidate.completion_id for candidate in comparison.candidates]
        answers = self._store.get_completions(comparison.scope, ids)
        items = [_item(answers.get(name), self._base_id) for name in ids]
        return [item for item in items if item is not None] if all(items) else []


def disagreement(rewards: Sequence[Sequence[float]]) -> float:
    """Return how much heads differ on which candidate is better: candidates by heads in.

    The largest standard deviation, over the heads, of the difference of two candidates' rewards:
    what all heads add to both alike says nothing of their order.
    """
    return max(
        (
            statistics.pstdev([a - b for a, b in zip(one, other, strict=True)])
            for one, other in itertools.combinations(rewards, 2)
        ),
        default=0.0,
    )


def _item(answer: Completion | None, base_id: str) -> ScoreItem | None:
    payload = answer.payload if answer is not None else None
    if answer is None or payload is None or answer.base_id != base_id:
        return None
    if not payload.prompt_ids or not payload.completion_ids:
        return None
    return ScoreItem(list(payload.prompt_ids), list(payload.completion_ids))

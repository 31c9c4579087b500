"""Score requests: log-probs of given completions, what a reward model says of them, or both.

Owns these requests from their arrival to their report. Each item becomes a sequence of its own for
each thing that is asked of it, because a policy and a reward model compute different keys and
values. Knows nothing of sockets or tensors. Runs in the engine child's main thread.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from heedful_server.engine.adapter_slots import NO_SLOT, AdapterSlots
from heedful_server.engine.scheduler import RequestTooLong, Scheduler
from heedful_server.engine.sequence import EngineRequest, Sequence
from heedful_server.errors import EngineRequestError
from heedful_server.protocol import Failed, FailureKind, Score, Scored, ScoreItem


@dataclass(slots=True, eq=False)
class _Request:
    """A score request and what is known of it so far, item by item."""

    score: Score
    deadline_at_s: float | None
    policy_slot: int
    reward_slot: int
    logprobs: list[list[float]]
    token_rewards: list[list[list[float]]]  # by item, token and head
    rewards: list[list[float]]  # by item and head, once all of an item's tokens are there
    sequence_ids: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing that was asked for is missing."""
        items = self.score.items
        has_logprobs = not self.score.logprobs or all(
            len(done) == len(item.completion_token_ids)
            for done, item in zip(self.logprobs, items, strict=True)
        )
        return has_logprobs and (not self.score.reward or all(self.rewards))


class Scoring:
    """The unfinished score requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        adapters: AdapterSlots,
        report: Callable[[Failed | Scored], None],
    ) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._report = report
        self._requests: dict[str, _Request] = {}
        # Of each scheduled sequence: the request and the item that it belongs to.
        self._owners: dict[str, tuple[str, int]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests."""
        return sorted(self._requests)

    def owner(self, sequence_id: str) -> str | None:
        """The score request that a scheduled sequence belongs to."""
        owner = self._owners.get(sequence_id)
        return None if owner is None else owner[0]

    def add(self, score: Score, deadline_at_s: float | None) -> None:
        """Queue a request, or report at once why it cannot be done."""
        try:
            policy_slot, reward_slot = self._acquire(score)
        except EngineRequestError as error:
            self._report(Failed(score.request_id, error.kind, str(error), error.field))
            return
        request = _Request(
            score=score,
            deadline_at_s=deadline_at_s,
            policy_slot=policy_slot,
            reward_slot=reward_slot,
            logprobs=[[] for _ in score.items],
            token_rewards=[[] for _ in score.items],
            rewards=[[] for _ in score.items],
        )
        self._requests[score.request_id] = request
        try:
            for idx, wanted in _wanted(request):
                request.sequence_ids.append(wanted.request_id)
                self._owners[wanted.request_id] = (score.request_id, idx)
                self._scheduler.add(wanted)
        except RequestTooLong as error:
            self.fail(score.request_id, "resource", str(error), f"items[{idx}]")
            return
        self._finish_if_done(request)

    def take_logprobs(self, sequence: Sequence, logprobs: list[float]) -> None:
        """Take log-probs of a sequence's next tokens."""
        request, idx = self._find(sequence)
        if request is None:
            return
        request.logprobs[idx] += logprobs
        if len(request.logprobs[idx]) == len(request.score.items[idx].completion_token_ids):
            # At once: other items may be waiting for its place and blocks.
            self._scheduler.finish(sequence)
        self._finish_if_done(request)

    def take_rewards(self, sequence: Sequence, rewards: list[float]) -> None:
        """Take what each head says of a sequence's next token; a reward is the mean over tokens."""
        request, idx = self._find(sequence)
        if request is None:
            return
        if not all(map(math.isfinite, rewards)):
            request_id = request.score.request_id
            self.fail(request_id, "internal", "a reward is not finite", f"items[{idx}]")
            return
        token_rewards = request.token_rewards[idx]
        token_rewards.append(rewards)
        if len(token_rewards) < _num_rewarded(request.score.items[idx]):
            return
        # Exact sums, so that a reward's bits do not depend on how its tokens were cut into chunks.
        request.rewards[idx] = [
            math.fsum(values) / len(values) for values in zip(*token_rewards, strict=True)
        ]
        self._scheduler.finish(sequence)
        self._finish_if_done(request)

    def fail(self, request_id: str, kind: FailureKind, message: str, field_name: str) -> None:
        """End a request with a failure."""
        self.drop(request_id)
        self._report(Failed(request_id, kind, message, field_name))

    def drop(self, request_id: str) -> None:
        """Forget a request and whatever is scheduled for it."""
        request = self._requests.pop(request_id)
        for sequence_id in request.sequence_ids:
            self._scheduler.cancel(sequence_id)
            del self._owners[sequence_id]
        if request.score.logprobs:
            self._adapters.release(request.score.policy)
        if request.score.reward:
            self._adapters.release(request.score.reward)

    def _acquire(self, score: Score) -> tuple[int, int]:
        """Slots of the policy and of the reward model, NO_SLOT for what is not asked for."""
        adapters = self._adapters
        policy_slot = NO_SLOT
        if score.logprobs:
            policy_slot = adapters.acquire(score.policy, "policy", "policy")
        if not score.reward:
            return policy_slot, NO_SLOT
        try:
            return policy_slot, adapters.acquire(score.reward, "reward", "reward")
        except EngineRequestError:
            if score.logprobs:
                adapters.release(score.policy)
            raise

    def _find(self, sequence: Sequence) -> tuple[_Request | None, int]:
        request_id, idx = self._owners.get(sequence.request_id, ("", 0))
        return self._requests.get(request_id), idx

    def _finish_if_done(self, request: _Request) -> None:
        if not request.finished:
            return
        score = request.score
        self._report(
            Scored(
                score.request_id,
                request.logprobs if score.logprobs else [],
                request.rewards if score.reward else [],
            )
        )
        self.drop(score.request_id)


def _wanted(request: _Request) -> Iterator[tuple[int, EngineRequest]]:
    """The sequences that a request needs, each with the index of its item."""
    score = request.score
    for idx, item in enumerate(score.items):
        if score.logprobs and item.completion_token_ids:
            yield idx, _sequence(request, item, f"{score.request_id}#{idx}", reward=False)
        if score.reward:
            yield idx, _sequence(request, item, f"{score.request_id}#{idx}r", reward=True)


def _sequence(
    request: _Request, item: ScoreItem, sequence_id: str, *, reward: bool
) -> EngineRequest:
    score = request.score
    token_ids = item.prompt_token_ids + item.completion_token_ids
    rewards_start = len(token_ids) - _num_rewarded(item)
    return EngineRequest(
        request_id=sequence_id,
        prompt_token_ids=token_ids,
        max_tokens=0,
        priority=score.priority,
        cache_salt=salt(score.cache_salt, score.reward if reward else score.policy),
        logits_start=rewards_start if reward else len(item.prompt_token_ids) - 1,
        deadline_at_s=request.deadline_at_s,
        adapter_slot=request.reward_slot if reward else request.policy_slot,
        wants_hidden=reward,
    )


def _num_rewarded(item: ScoreItem) -> int:
    """Tokens over which a reward is the mean: those of the completion, or the prompt's last."""
    return max(1, len(item.completion_token_ids))


def salt(cache_salt: str, policy: str) -> bytes:
    """What tells apart the keys and values of tenants and policies in the prefix cache."""
    return f"{policy}\0{cache_salt}".encode()

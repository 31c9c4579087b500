"""Scores and rewards of given completions.

Owns the steps between a validated scoring request and the engine, and the choice of the best among
sampled completions. It knows nothing of protobuf or gRPC. Event loop.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heedful_store import Scope, uuid7

from heedful_server.deployment.door import PolicyDoor
from heedful_server.deployment.residency import Hold
from heedful_server.engine_client.client import EngineClient
from heedful_server.feedback.access import scope_of
from heedful_server.protocol import BASE_POLICY, Score, Scored, ScoreItem
from heedful_server.readiness import Readiness
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.call import Call, caller, engine_deadline_s
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.model_rules import (
    ModelLimits,
    require_completion_fits,
    require_prompt_fits,
)
from heedful_server.rpc.parts import Part
from heedful_server.rpc.requests import ScoringItem, ScoringRequest
from heedful_server.rpc.text_pool import TextPool
from heedful_server.security.quota import Quota


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """A completion's tokens, the log-prob of each and, where asked for, the reward."""

    token_ids: list[int]
    logprobs: list[float]
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """The items of one request, and the version whose log-probs they are."""

    items: list[ScoredItem]
    policy_version: str


class Scorer:
    """Scores on one engine."""

    def __init__(
        self,
        engine: EngineClient,
        readiness: Readiness,
        text: TextPool,
        admission: Admission,
        quota: Quota,
        door: PolicyDoor,
    ) -> None:
        self._engine = engine
        self._readiness = readiness
        self._text = text
        self._admission = admission
        self._quota = quota
        self._door = door

    async def score(self, request: ScoringRequest, call: Call) -> Scores:
        """Return the log-probs of given completions, and their rewards; raises as Generator.start.

        Raises:
            PreconditionFailed: rewards are asked for, and there is no reward model.
        """
        who = caller()
        scope = scope_of(who, request.project)
        info = self._readiness.require()
        num_items = len(request.items)
        holds: list[Hold] = []
        self._admission.admit(num_items, request.priority)
        try:
            holds.append(await self._door.enter(who, scope, request.model))
            if request.reward:
                holds.append(await self._door.enter_reward(scope))
            model = ModelLimits(info.vocab_size, info.context_tokens)
            items = [
                await self._score_item(item, f"items[{i}]", model)
                for i, item in enumerate(request.items)
            ]
            num_tokens = sum(len(i.prompt_token_ids) + len(i.completion_token_ids) for i in items)
            self._quota.take(who.tenant, num_tokens)
            scored = await self._ask(holds, items, request.priority, call)
        finally:
            self._admission.release(num_items, request.priority)
            for hold in holds:
                hold.release()
        return Scores(_scored_items(items, scored), holds[0].policy.version)

    async def heads(
        self, scope: Scope, items: Sequence[ScoreItem], priority: int, deadline_s: float | None
    ) -> list[list[float]]:
        """Return what each head of the project's reward model says of each item."""
        hold = await self._door.enter_reward(scope)
        self._admission.admit(len(items), priority)
        try:
            await self._door.ready(hold)
            scored = await self._engine.score(
                Score(
                    request_id=uuid7(),
                    items=list(items),
                    priority=priority,
                    deadline_s=deadline_s,
                    policy=BASE_POLICY,
                    reward=hold.policy.adapter_id,
                    logprobs=False,
                )
            )
        finally:
            self._admission.release(len(items), priority)
            hold.release()
        return scored.rewards

    async def best(self, generation: Generation, parts: list[Part]) -> list[Part]:
        """Return the n completions with the highest rewards, the best first, each with its own."""
        request, answering = generation.request, generation.entry.answering
        prompt_ids = list(answering.prompt_ids)
        said = [part for part in parts if part.token_ids]
        items = [ScoreItem(prompt_ids, part.token_ids) for part in said]
        rewards: list[list[float]] = []
        if items:
            rewards = await self.heads(answering.scope, items, request.priority, None)
        for part, heads in zip(said, rewards, strict=True):
            part.reward = mean(heads)
        # An empty answer has no last token to judge; it is worse than any other.
        ranked = sorted(parts, key=lambda part: -math.inf if part.reward is None else part.reward)
        return ranked[::-1][: request.n]

    async def _ask(
        self, holds: list[Hold], items: list[ScoreItem], priority: int, call: Call
    ) -> Scored:
        for hold in holds:
            await self._door.ready(hold)
        return await self._engine.score(
            Score(
                request_id=uuid7(),
                items=items,
                priority=priority,
                deadline_s=engine_deadline_s(call),
                policy=holds[0].policy.adapter_id,
                reward=holds[1].policy.adapter_id if len(holds) > 1 else "",
            )
        )

    async def _score_item(self, item: ScoringItem, path: str, model: ModelLimits) -> ScoreItem:
        prompt_ids = await self._text.encode_prompt(item.prompt, f"{path}.prompt")
        require_prompt_fits(item.prompt, prompt_ids, model, f"{path}.prompt")
        completion_ids = await self._text.encode_completion(item)
        room = model.context_tokens - len(prompt_ids)
        require_completion_fits(item.completion, completion_ids, room, model, path)
        return ScoreItem(prompt_ids, completion_ids)


def mean(heads: Sequence[float]) -> float:
    """Return the reward: the mean over the heads."""
    return math.fsum(heads) / len(heads)


def _scored_items(items: Sequence[ScoreItem], scored: Scored) -> list[ScoredItem]:
    rewards: list[float | None] = [mean(heads) for heads in scored.rewards]
    rewards = rewards or [None] * len(items)
    return [
        ScoredItem(item.completion_token_ids, logprobs, reward)
        for item, logprobs, reward in zip(items, scored.logprobs, rewards, strict=True)
    ]

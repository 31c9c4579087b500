"""Blind comparisons: drawn, generated, shuffled, recorded; and the ones still without an answer.

Owns the draw of policies with its propensities and the order shown, both recorded before anything
is shown. Versions stay out of every value that leaves here. It knows nothing of messages. Event
loop.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heedful_store import Candidate, Comparison, Completion, Scope, Store, now_ms, uuid7
from heedful_store.records import Purpose

from heedful_server.deployment.door import PolicyDoor
from heedful_server.deployment.served import CHALLENGER, CHAMPION
from heedful_server.errors import InvalidRequest, PreconditionFailed, StoreUnavailable
from heedful_server.feedback import queries
from heedful_server.feedback.access import scope_of
from heedful_server.feedback.completion_log import CompletionLog
from heedful_server.feedback.recent import RecentAnswers
from heedful_server.feedback.tokens import Tokens
from heedful_server.feedback.uncertainty import Uncertainty
from heedful_server.identity import FEEDBACK_ANY, Caller
from heedful_server.rpc.call import Call, caller
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.generator import Generator
from heedful_server.rpc.parts import Part
from heedful_server.rpc.requests import ChatPrompt, GenerationRequest

_random = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """A request for a blind set of as many candidates as `generation` has samples.

    No `models` leave the choice to the server.
    """

    generation: GenerationRequest
    purpose: Purpose
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownCandidate:
    """One candidate as the rater sees it."""

    completion_id: str
    token: str
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Question:
    """A blind comparison, its candidates in the order to show them in."""

    comparison_id: str
    token: str
    candidates: tuple[ShownCandidate, ...]
    prompt_text: str
    messages: str | None  # the conversation as JSON, where the prompt was one


@dataclass(frozen=True, slots=True)
class _Answer:
    """One candidate and who gave it."""

    shown: ShownCandidate
    version: str
    scope: Scope
    prompt_text: str


class Comparing:
    """Makes comparisons and finds those that wait."""

    def __init__(
        self,
        generator: Generator,
        log: CompletionLog,
        store: Store,
        tokens: Tokens,
        recent: RecentAnswers,
        door: PolicyDoor,
        uncertainty: Uncertainty,
    ) -> None:
        self._generator = generator
        self._log = log
        self._store = store
        self._tokens = tokens
        self._recent = recent
        self._door = door
        self._uncertainty = uncertainty

    async def compare(self, request: ComparisonRequest, call: Call) -> Question:
        """Generate and record a blind set of candidates.

        Raises:
            PreconditionFailed: there is one policy and the purpose needs two, or nothing may be
                logged.
            StoreError: the comparison cannot be recorded; nothing is shown then.
            HeedfulServerError: as Generator.start does.
        """
        if self._log.consent_for(request.generation.origin).log == "none":
            raise PreconditionFailed(
                "a comparison has to be logged, and the consent of this request or the server's "
                "setting does not allow it"
            )
        models = await self._models(request)
        drawn = draw(models, request.generation.n, request.purpose)
        answers = await self._all_answers(request.generation, drawn, call)
        comparison = _shuffled(request, answers, 1 / len(models))
        await self._store.create_comparison(comparison)
        self._recent.comparisons.put(comparison.comparison_id, comparison)
        return self._shown(request, comparison, answers)

    async def _models(self, request: ComparisonRequest) -> tuple[str, ...]:
        """Return the policies to draw from; raises as compare does."""
        who = caller()
        scope = scope_of(who, request.generation.origin.project)
        models = request.models
        if not models:
            challenger = self._door.directory.alias(scope, CHALLENGER)
            models = (CHAMPION,) if challenger is None else (CHAMPION, CHALLENGER)
        versions = {model: await self._door.version(who, scope, model) for model in models}
        models = tuple({version: model for model, version in versions.items()}.values())
        if request.purpose == "gate" and len(models) < 2:
            raise PreconditionFailed(
                "purpose gate compares two policies, and this project has no challenger; "
                "name two, or use purpose learn"
            )
        return models

    async def _all_answers(
        self, request: GenerationRequest, drawn: list[tuple[str, int]], call: Call
    ) -> list[_Answer]:
        """Generate the candidates of all policies; where one fails, the others end too."""
        tasks = [
            asyncio.create_task(self._answers(request, model, count, call))
            for model, count in drawn
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [answer for answers in found for answer in answers]

    async def _answers(
        self, request: GenerationRequest, model: str, count: int, call: Call
    ) -> list[_Answer]:
        """Generate the candidates of one policy."""
        with await self._generator.start(replace(request, model=model, n=count), call) as running:
            parts = await running.collect()
            if not all(part.rateable for part in parts):
                raise StoreUnavailable("the candidates could not be recorded")
            return [_answer(running, part) for part in parts]

    async def next_question(
        self, caller: Caller, scope: Scope, end_user: str
    ) -> tuple[Question | None, int]:
        """Return the comparison without a vote that would teach most, and how many there are.

        That is the one on which the heads of the reward model disagree most; without a reward
        model, or where none of them is scored yet, the oldest.

        Raises:
            InvalidRequest: the caller may only ask for one end user and names none.
        """
        if not end_user and FEEDBACK_ANY not in caller.scopes:
            raise InvalidRequest("end_user", f"is needed without the scope {FEEDBACK_ANY!r}")
        found = await asyncio.to_thread(self._best, scope, end_user or None)
        comparison, answers, num_open = found
        self._uncertainty.look_at(scope)
        if comparison is None:
            return None, num_open
        return self._asked(comparison, answers, comparison.end_user or end_user), num_open

    def _best(
        self, scope: Scope, end_user: str | None
    ) -> tuple[Comparison | None, Mapping[str, Completion], int]:
        with self._store.read() as connection:
            ids, num_open = queries.open_questions(connection, scope, end_user)
        if not ids:
            return None, {}, num_open
        comparison_id = self._uncertainty.most_uncertain(ids)
        comparison = self._store.get_comparison(scope, comparison_id)
        shown = [candidate.completion_id for candidate in comparison.candidates]
        return comparison, self._store.get_completions(scope, shown), num_open

    def _asked(
        self, comparison: Comparison, answers: Mapping[str, Completion], end_user: str
    ) -> Question:
        """Return a comparison of the log as it is shown."""
        shown = []
        first = None
        for candidate in _in_order(comparison):
            answer = answers[candidate.completion_id]
            payload = first = answer.payload
            text = payload.completion_text if payload is not None else ""
            token = self._candidate_token(comparison.scope, candidate, end_user)
            shown.append(ShownCandidate(answer.completion_id, token, text, answer.finish_reason))
        return Question(
            comparison_id=comparison.comparison_id,
            token=self._token(comparison, end_user),
            candidates=tuple(shown),
            prompt_text=first.prompt_text if first is not None else "",
            messages=first.messages if first is not None else None,
        )

    def _shown(
        self, request: ComparisonRequest, comparison: Comparison, answers: list[_Answer]
    ) -> Question:
        """Return a comparison that was just generated."""
        by_id = {answer.shown.completion_id: answer for answer in answers}
        shown = [by_id[candidate.completion_id].shown for candidate in _in_order(comparison)]
        prompt = request.generation.prompt
        messages = None
        if isinstance(prompt, ChatPrompt):
            turns = [{"role": role, "content": content} for role, content in prompt.messages]
            messages = json.dumps(turns)
        return Question(
            comparison_id=comparison.comparison_id,
            token=self._token(comparison, comparison.end_user),
            candidates=tuple(shown),
            prompt_text=answers[0].prompt_text,
            messages=messages,
        )

    def _token(self, comparison: Comparison, end_user: str) -> str:
        return self._tokens.sign(
            "comparison",
            comparison.comparison_id,
            tenant=comparison.scope.tenant,
            project=comparison.scope.project,
            end_user=end_user,
        )

    def _candidate_token(self, scope: Scope, candidate: Candidate, end_user: str) -> str:
        return self._tokens.sign(
            "completion",
            candidate.completion_id,
            tenant=scope.tenant,
            project=scope.project,
            end_user=end_user,
            policy_version=candidate.policy_version,
        )


def draw(models: Sequence[str], count: int, purpose: Purpose) -> list[tuple[str, int]]:
    """Return how many candidates each policy gives, drawn so that each place is anybody's.

    For the gate two different policies answer. For learning as many as there is room for do, and
    where there are more candidates than policies they share them as evenly as they can.
    """
    order = _random.sample(list(models), len(models))
    if purpose == "gate":
        order = order[:2]
    counts = Counter(order[i % len(order)] for i in range(count))
    return list(counts.items())


def _answer(generation: Generation, part: Part) -> _Answer:
    entry, index = generation.entry, part.index
    assert part.finish is not None, "collect returns ends"
    shown = ShownCandidate(
        completion_id=generation.completion_ids[index],
        token=entry.tokens[index],
        text="".join(part.texts),
        finish_reason=part.finish.reason,
    )
    return _Answer(
        shown, generation.served.policy_version, entry.answering.scope, entry.answering.prompt_text
    )


def _shuffled(
    request: ComparisonRequest, answers: Sequence[_Answer], propensity: float
) -> Comparison:
    """Return the record of a comparison with its candidates in a random order."""
    positions = list(range(len(answers)))
    _random.shuffle(positions)
    origin = request.generation.origin
    return Comparison(
        comparison_id=uuid7(),
        scope=answers[0].scope,
        purpose=request.purpose,
        candidates=tuple(
            Candidate(answer.shown.completion_id, answer.version, position, propensity)
            for answer, position in zip(answers, positions, strict=True)
        ),
        created_at_ms=now_ms(),
        end_user=origin.end_user,
        conversation_id=origin.conversation_id,
        tags=origin.tags,
    )


def _in_order(comparison: Comparison) -> list[Candidate]:
    return sorted(comparison.candidates, key=lambda candidate: candidate.position)

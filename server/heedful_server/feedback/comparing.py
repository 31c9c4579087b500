"""Blind comparisons: drawn, generated, shuffled, recorded; and the ones still without an answer.

Owns the draw of policies with its propensities and the order shown, both recorded before anything
is shown. Versions stay out of every value that leaves here. It knows nothing of messages. Event
loop.
"""

import asyncio
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from heedful_store import Candidate, Comparison, Completion, Scope, Store, now_ms, uuid7
from heedful_store.records import Purpose

from heedful_server.errors import InvalidRequest, PreconditionFailed, StoreUnavailable
from heedful_server.feedback import queries
from heedful_server.feedback.completion_log import CompletionLog
from heedful_server.feedback.recent import RecentAnswers
from heedful_server.feedback.tokens import Tokens
from heedful_server.identity import FEEDBACK_ANY, Caller
from heedful_server.rpc.call import Call
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.generator import Generator
from heedful_server.rpc.parts import Part
from heedful_server.rpc.requests import ChatPrompt, GenerationRequest
from heedful_server.rpc.validate import BASE_VERSION

_random = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """A request for a blind set of as many candidates as `generation` has samples."""

    generation: GenerationRequest
    purpose: Purpose


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


class Comparing:
    """Makes comparisons and finds those that wait."""

    def __init__(
        self,
        generator: Generator,
        log: CompletionLog,
        store: Store,
        tokens: Tokens,
        recent: RecentAnswers,
    ) -> None:
        self._generator = generator
        self._log = log
        self._store = store
        self._tokens = tokens
        self._recent = recent

    async def compare(self, request: ComparisonRequest, call: Call) -> Question:
        """Generate and record a blind set of candidates.

        Raises:
            PreconditionFailed: there is one policy and the purpose needs two, or nothing may be
                logged.
            StoreError: the comparison cannot be recorded; nothing is shown then.
            HeedfulServerError: as Generator.start does.
        """
        policies = [BASE_VERSION]
        if request.purpose == "gate" and len(policies) < 2:
            raise PreconditionFailed(
                "purpose gate compares two policies, and this server has one; use purpose learn"
            )
        if self._log.consent_for(request.generation.origin).log == "none":
            raise PreconditionFailed(
                "a comparison has to be logged, and the consent of this request or the server's "
                "setting does not allow it"
            )
        with await self._generator.start(request.generation, call) as generation:
            parts = await generation.collect()
        if not all(part.rateable for part in parts):
            raise StoreUnavailable("the candidates could not be recorded")
        comparison = _shuffled(request, generation, 1 / len(policies))
        await self._store.create_comparison(comparison)
        self._recent.comparisons.put(comparison.comparison_id, comparison)
        return self._shown(comparison, generation, parts)

    async def next_question(
        self, caller: Caller, scope: Scope, end_user: str
    ) -> tuple[Question | None, int]:
        """Return the oldest comparison without a vote, and how many there are.

        Raises:
            InvalidRequest: the caller may only ask for one end user and names none.
        """
        if not end_user and FEEDBACK_ANY not in caller.scopes:
            raise InvalidRequest("end_user", f"is needed without the scope {FEEDBACK_ANY!r}")
        found = await asyncio.to_thread(self._oldest, scope, end_user or None)
        comparison, answers, num_open = found
        if comparison is None:
            return None, num_open
        return self._asked(comparison, answers, comparison.end_user or end_user), num_open

    def _oldest(
        self, scope: Scope, end_user: str | None
    ) -> tuple[Comparison | None, Mapping[str, Completion], int]:
        with self._store.read() as connection:
            comparison_id, num_open = queries.oldest_question(connection, scope, end_user)
        if comparison_id is None:
            return None, {}, num_open
        comparison = self._store.get_comparison(scope, comparison_id)
        ids = [candidate.completion_id for candidate in comparison.candidates]
        return comparison, self._store.get_completions(scope, ids), num_open

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

    def _shown(self, comparison: Comparison, generation: Generation, parts: list[Part]) -> Question:
        """Return a comparison that was just generated."""
        shown: list[ShownCandidate] = []
        for candidate in _in_order(comparison):
            index = generation.completion_ids.index(candidate.completion_id)
            finish = parts[index].finish
            assert finish is not None, "collect returns ends"
            token, text = generation.entry.tokens[index], "".join(parts[index].texts)
            shown.append(ShownCandidate(candidate.completion_id, token, text, finish.reason))
        prompt = generation.request.prompt
        messages = None
        if isinstance(prompt, ChatPrompt):
            turns = [{"role": role, "content": content} for role, content in prompt.messages]
            messages = json.dumps(turns)
        return Question(
            comparison_id=comparison.comparison_id,
            token=self._token(comparison, comparison.end_user),
            candidates=tuple(shown),
            prompt_text=generation.entry.answering.prompt_text,
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


def _shuffled(request: ComparisonRequest, generation: Generation, propensity: float) -> Comparison:
    """Return the record of a comparison with its candidates in a random order."""
    positions = list(range(len(generation.completion_ids)))
    _random.shuffle(positions)
    origin = request.generation.origin
    return Comparison(
        comparison_id=uuid7(),
        scope=generation.entry.answering.scope,
        purpose=request.purpose,
        candidates=tuple(
            Candidate(completion_id, generation.served.policy_version, position, propensity)
            for completion_id, position in zip(generation.completion_ids, positions, strict=True)
        ),
        created_at_ms=now_ms(),
        end_user=origin.end_user,
        conversation_id=origin.conversation_id,
        tags=origin.tags,
    )


def _in_order(comparison: Comparison) -> list[Candidate]:
    return sorted(comparison.candidates, key=lambda candidate: candidate.position)

"""Where judgements come in: proof, defaults, the log, the receipt.

Owns who may judge what, in whose name, and what is said about an answer that was never logged. The
store owns idempotency, edits and order. The hot path makes no hop between threads: the store's
acknowledgement resolves on the event loop. It knows nothing of messages.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace

from heedful_store import (
    Ack,
    Comparison,
    FeedbackEvent,
    Invalid,
    NotFound,
    Profile,
    Ranking,
    Receipt,
    Retraction,
    Scope,
    Store,
    StoredFeedback,
    StoreError,
)
from heedful_store.eligibility import tier_of
from heedful_store.judgements import ranked_ids

from heedful_server.errors import HeedfulServerError, InvalidRequest, NotRateable
from heedful_server.feedback.access import UNKNOWN_TARGET, claims_of
from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.feedback.recent import RecentAnswers
from heedful_server.feedback.submission import Submission
from heedful_server.feedback.tokens import TokenKind, Tokens
from heedful_server.identity import FEEDBACK_ANY, Caller

Outcome = Receipt | StoreError | HeedfulServerError


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A judgement that may be logged."""

    event: FeedbackEvent
    owner: str = ""  # whose the answer must be, where the caller may not judge anybody's
    receiver: str = ""  # who holds the token
    is_proven: bool = False  # the answer exists, even where it is not visible yet


class FeedbackDesk:
    """Accepts judgements and retractions."""

    def __init__(
        self,
        store: Store,
        tokens: Tokens,
        recent: RecentAnswers,
        metrics: FeedbackMetrics,
        profile: Profile,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._recent = recent
        self._metrics = metrics
        self._profile = profile

    async def submit(self, caller: Caller, said: Submission) -> Receipt:
        """Log a judgement and return its receipt once it is durable.

        Raises:
            InvalidRequest: a token or a field does not fit.
            NotRateable: the answer was not logged.
            StoreError: as the store's append_feedback does; NotFound for what is somebody else's.
        """
        try:
            event, ack = await self._append(caller, said)
            return self._count(event, await _acknowledged(ack, said))
        except (HeedfulServerError, StoreError) as error:
            self._metrics.refused.labels(type(error).__name__).inc()
            raise

    async def submit_batch(
        self, caller: Caller, items: Sequence[Submission | HeedfulServerError]
    ) -> list[Outcome]:
        """Log judgements in their order; each has its own outcome, errors pass through."""
        waiting: list[tuple[Submission, FeedbackEvent, Ack[Receipt]] | Exception] = []
        for said in items:
            if isinstance(said, HeedfulServerError):
                waiting.append(said)
                continue
            try:
                waiting.append((said, *await self._append(caller, said)))
            except (HeedfulServerError, StoreError) as error:
                waiting.append(error)
        return [await self._outcome(item) for item in waiting]

    async def retract(
        self, caller: Caller, scope: Scope, retraction_id: str, feedback_id: str, token: str
    ) -> Receipt:
        """Take back a judgement with all its edits; raises as submit does."""
        stored = await asyncio.to_thread(self._store.get_feedback, scope, feedback_id)
        require_own(self._tokens, caller, stored, token)
        original = stored.event
        if original is None:
            raise NotFound(f"feedback {feedback_id}")
        event = FeedbackEvent(
            feedback_id=retraction_id,
            scope=scope,
            judgement=Retraction(),
            rater_id=original.rater_id,
            rater_kind=original.rater_kind,
            supersedes_id=feedback_id,
            key_id=caller.key_id,
        )
        return self._count(event, await self._store.append_feedback(event))

    async def _outcome(
        self, item: tuple[Submission, FeedbackEvent, Ack[Receipt]] | Exception
    ) -> Outcome:
        try:
            if isinstance(item, Exception):
                raise item
            said, event, ack = item
            return self._count(event, await _acknowledged(ack, said))
        except (HeedfulServerError, StoreError) as error:
            self._metrics.refused.labels(type(error).__name__).inc()
            return error

    async def _append(self, caller: Caller, said: Submission) -> tuple[FeedbackEvent, Ack[Receipt]]:
        """Check who may say this, and hand it to the store."""
        event = said.event
        if isinstance(event.judgement, Ranking) and event.comparison_id is not None:
            admitted = await self._answer_to_comparison(caller, said)
        elif isinstance(event.judgement, Ranking):
            admitted = self._free_ranking(caller, said)
        else:
            admitted = await self._about_completion(caller, said)
        event, owner = admitted.event, None
        if FEEDBACK_ANY not in caller.scopes:
            _require_role(event, admitted.receiver, said.path)
            owner = admitted.owner
        hold = admitted.is_proven
        try:
            return event, self._store.append_feedback(event, hold_unknown=hold, owner=owner)
        except Invalid as error:
            raise InvalidRequest(f"{said.path}{error.field}", error.reason) from None

    async def _about_completion(self, caller: Caller, said: Submission) -> _Admitted:
        event = said.event
        assert event.completion_id is not None, "validated"
        self._require_logged(event.scope, event.completion_id)
        claims = claims_of(
            self._tokens,
            "completion",
            said.completion_token,
            event.completion_id,
            f"{said.path}completion_token",
            caller,
            event.scope,
        )
        if claims is None and event.rater_id:
            return _Admitted(event)
        end_user = await self._end_user(event.scope, event.completion_id)
        if claims is not None:
            end_user = claims.end_user
            return _Admitted(_signed(event, end_user), end_user, end_user, is_proven=True)
        if end_user is None:
            raise NotFound(UNKNOWN_TARGET)
        return _Admitted(_signed(event, end_user))

    async def _answer_to_comparison(self, caller: Caller, said: Submission) -> _Admitted:
        event = said.event
        assert event.comparison_id is not None, "checked by the caller"
        assert isinstance(event.judgement, Ranking), "checked by the caller"
        claims = claims_of(
            self._tokens,
            "comparison",
            said.comparison_token,
            event.comparison_id,
            f"{said.path}comparison_token",
            caller,
            event.scope,
        )
        comparison = await self._comparison(event.scope, event.comparison_id)
        judgement = _require_as_shown(event.judgement, comparison, said.path)
        # A question for nobody in particular was shown to whom the token names.
        receiver = claims.end_user if claims is not None else comparison.end_user
        event = _signed(replace(event, judgement=judgement), receiver)
        return _Admitted(event, comparison.end_user, receiver)

    def _free_ranking(self, caller: Caller, said: Submission) -> _Admitted:
        if FEEDBACK_ANY not in caller.scopes:
            reason = f"is needed without the scope {FEEDBACK_ANY!r}"
            raise InvalidRequest(f"{said.path}comparison_id", reason)
        for name in ranked_ids(said.event.judgement):
            self._require_logged(said.event.scope, name)
        return _Admitted(said.event)

    async def _end_user(self, scope: Scope, completion_id: str) -> str | None:
        """Return who got an answer, None where it is not visible (yet); NotFound if erased."""
        known = self._recent.end_users
        if completion_id not in known:
            found = await asyncio.to_thread(self._store.get_completions, scope, [completion_id])
            answer = found.get(completion_id)
            if answer is None:
                return None
            # A token outlives an erasure, and what it says must not come back into the log.
            if answer.erased_at_ms is not None:
                raise NotFound(UNKNOWN_TARGET)
            known.put(completion_id, (scope, answer.end_user))
        owner_scope, end_user = known[completion_id]
        return end_user if owner_scope == scope else None

    async def _comparison(self, scope: Scope, comparison_id: str) -> Comparison:
        known = self._recent.comparisons
        if comparison_id not in known:
            try:
                read = self._store.get_comparison
                known.put(comparison_id, await asyncio.to_thread(read, scope, comparison_id))
            except NotFound:
                raise NotFound(UNKNOWN_TARGET) from None
        comparison = known[comparison_id]
        if comparison.scope != scope:
            raise NotFound(UNKNOWN_TARGET)
        return comparison

    def _require_logged(self, scope: Scope, completion_id: str) -> None:
        if self._recent.is_unlogged(scope, completion_id):
            raise NotRateable("this completion was not logged, so it cannot be rated")

    def _count(self, event: FeedbackEvent, receipt: Receipt) -> Receipt:
        kind = type(event.judgement).__name__.lower()
        status = "duplicate" if receipt.duplicate else receipt.state
        self._metrics.count_event(kind, tier_of(event, self._profile), status)
        return receipt


def require_own(tokens: Tokens, caller: Caller, stored: StoredFeedback, token: str) -> None:
    """Raise NotFound unless a caller may read or take back an event; else as claims_of does."""
    if FEEDBACK_ANY in caller.scopes and not token:
        return
    event = stored.event
    if event is None:
        raise NotFound(f"feedback {stored.feedback_id}")
    kind: TokenKind = "completion" if event.comparison_id is None else "comparison"
    target_id = event.comparison_id or event.completion_id or ""
    try:
        claims = claims_of(tokens, kind, token, target_id, "token", caller, event.scope)
    except NotFound:
        raise NotFound(f"feedback {stored.feedback_id}") from None
    is_others = claims is not None and claims.end_user != event.rater_id
    if is_others and FEEDBACK_ANY not in caller.scopes:
        raise NotFound(f"feedback {stored.feedback_id}")


async def _acknowledged(ack: Awaitable[Receipt], said: Submission) -> Receipt:
    try:
        return await ack
    except Invalid as error:
        raise InvalidRequest(f"{said.path}{error.field}", error.reason) from None


def _signed(event: FeedbackEvent, end_user: str) -> FeedbackEvent:
    """Return an event in the name of its rater, by default the person who got the answer."""
    return event if event.rater_id or not end_user else replace(event, rater_id=end_user)


def _require_role(event: FeedbackEvent, receiver: str, path: str) -> None:
    """Let only an app's back end speak for others, or in another role than the end user's."""
    reason = f"needs the scope {FEEDBACK_ANY!r}"
    if event.rater_kind != "end_user":
        raise InvalidRequest(f"{path}rater_kind", reason)
    if event.rater_id != receiver:
        raise InvalidRequest(f"{path}rater_id", f"another person's {reason}")


def _require_as_shown(judgement: Ranking, comparison: Comparison, path: str) -> Ranking:
    """Return a ranking of exactly the answers shown, filled in where it only says all_bad."""
    in_order = sorted(comparison.candidates, key=lambda candidate: candidate.position)
    shown = tuple(candidate.completion_id for candidate in in_order)
    if not judgement.groups:
        return Ranking((shown,), judgement.all_bad)
    for i, group in enumerate(judgement.groups):
        if not set(group) <= set(shown):
            reason = "names a completion that was not shown"
            raise InvalidRequest(f"{path}ranking.groups[{i}]", reason)
    if len(ranked_ids(judgement)) != len(shown):
        raise InvalidRequest(f"{path}ranking.groups", "must name every completion shown")
    return judgement

"""Reading the log: judgements with what became of them, answers, summaries.

Owns who may read what and what is withheld while a comparison is blind. Whether an event may be
trained on is the store's decision. It knows nothing of messages. Methods run on the event loop and
read in worker threads.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from heedful_store import (
    Completion,
    Counts,
    Fate,
    FeedbackFilter,
    NotFound,
    Profile,
    Ranking,
    Scope,
    Store,
    StoredFeedback,
    Summary,
    fate_of,
)
from heedful_store.eligibility import LIMITS, Standing
from heedful_store.judgements import ranked_ids

from heedful_server.feedback import queries
from heedful_server.feedback.access import claims_of
from heedful_server.feedback.desk import require_own
from heedful_server.feedback.submission import Page
from heedful_server.feedback.tokens import Tokens
from heedful_server.identity import FEEDBACK_ANY, Caller

# Answers come with their texts, so an export reads little at a time.
_EXPORT_PAGE = 100

# As if the rater had said nothing before, in a project with raters enough.
_NO_CAPS = Counts(raters=1_000_000)


@dataclass(frozen=True, slots=True)
class Record:
    """One event as its readers see it.

    In lists `fate` leaves out the caps on raters: only `FeedbackReader.get` counts those.
    """

    stored: StoredFeedback
    standing: Standing
    fate: Fate
    fate_is_exact: bool
    answers: tuple[Completion, ...]
    blind: frozenset[str]


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """An answer of the log; while `is_blind`, version and log-probs are withheld."""

    completion: Completion
    is_blind: bool


class FeedbackReader:
    """Answers questions about the log."""

    def __init__(self, store: Store, tokens: Tokens, profile: Profile) -> None:
        self._store = store
        self._tokens = tokens
        self._profile = profile
        self._has_caps = LIMITS[profile] is not None

    async def get(self, caller: Caller, scope: Scope, feedback_id: str, token: str) -> Record:
        """Return an event with its fate.

        Raises:
            NotFound: there is none, or it is somebody else's.
            InvalidRequest: the token is missing or not genuine.
        """
        stored = await asyncio.to_thread(self._store.get_feedback, scope, feedback_id)
        require_own(self._tokens, caller, stored, token)
        (record,) = await asyncio.to_thread(self._records, scope, [stored])
        if record.fate_is_exact:
            return record
        read = self._store.feedback_fate
        fate = await asyncio.to_thread(read, scope, feedback_id, self._profile)
        return replace(record, fate=fate, fate_is_exact=True)

    async def page(self, wanted: Page) -> list[Record]:
        """Return up to `wanted.size` events after a place in the log."""
        return await asyncio.to_thread(self._page, wanted.criteria, wanted.after_seq, wanted.size)

    async def export(self, criteria: FeedbackFilter, after_seq: int) -> AsyncIterator[Record]:
        """Yield all events after a place in the log; holds one page in memory."""
        while True:
            page = await asyncio.to_thread(self._page, criteria, after_seq, _EXPORT_PAGE)
            for record in page:
                yield record
            if len(page) < _EXPORT_PAGE:
                return
            after_seq = page[-1].stored.seq

    async def completion(
        self, caller: Caller, scope: Scope, completion_id: str, token: str
    ) -> LoggedAnswer:
        """Return an answer to those who may read it; raises as get does."""
        field = "completion_token"
        unknown = NotFound(f"completion {completion_id}")
        try:
            claims = claims_of(
                self._tokens, "completion", token, completion_id, field, caller, scope
            )
            answer = await asyncio.to_thread(self._answer, scope, completion_id)
        except NotFound:
            raise unknown from None
        is_mine = claims is not None and claims.end_user == answer.completion.end_user
        if not is_mine and FEEDBACK_ANY not in caller.scopes:
            raise unknown
        return answer

    async def summary(self, scope: Scope) -> tuple[Summary, int]:
        """Return the log in numbers, and how many current events no run has read."""
        return await asyncio.to_thread(self._summary, scope)

    def _summary(self, scope: Scope) -> tuple[Summary, int]:
        found = self._store.summary(FeedbackFilter(scope=scope))
        with self._store.read() as connection:
            cursor = queries.trained_cursor(connection, scope)
        return found, self._store.backlog(scope, cursor)

    def _answer(self, scope: Scope, completion_id: str) -> LoggedAnswer:
        completion = self._store.get_completion(scope, completion_id)
        with self._store.read() as connection:
            blind = queries.blind(connection, scope, [completion_id])
        return LoggedAnswer(completion, completion_id in blind)

    def _page(self, criteria: FeedbackFilter, after_seq: int, size: int) -> list[Record]:
        found = self._store.list_feedback(criteria, after_seq=after_seq, limit=size)
        return self._records(criteria.scope, found)

    def _records(self, scope: Scope, page: Sequence[StoredFeedback]) -> list[Record]:
        if not page:
            return []
        names = {stored.seq: _answer_ids(stored) for stored in page}
        wanted = {name for some in names.values() for name in some}
        answers = self._store.get_completions(scope, wanted)
        seqs = list(names)
        with self._store.read() as connection:
            standings = queries.standings(connection, seqs)
            uses = queries.uses(connection, scope, seqs)
            blind = frozenset(queries.blind(connection, scope, wanted))
        records = []
        for stored in page:
            about = tuple(answers[name] for name in names[stored.seq] if name in answers)
            standing = standings[stored.seq]
            fate = fate_of(stored, standing, about, self._profile, _NO_CAPS)
            fate = replace(fate, uses=tuple(uses.get(stored.seq, ())))
            is_exact = not self._has_caps or fate.reason is not None
            records.append(Record(stored, standing, fate, is_exact, about, blind))
        return records


def _answer_ids(stored: StoredFeedback) -> tuple[str, ...]:
    event = stored.event
    if event is None:
        return ()
    if isinstance(event.judgement, Ranking):
        return ranked_ids(event.judgement)
    return (event.completion_id,) if event.completion_id is not None else ()

"""The store as server, trainer and command line hold it: one object, one writer, many readers.

Owns the list of what can be asked of the log; ``registry`` adds training and deployment, ``opened``
the lifetime of writer and readers. Rules and SQL are in the modules that it calls. Every write
returns an ``Ack``: await it in a coroutine, call ``result()`` in a thread. Every read blocks: in a
coroutine use ``asyncio.to_thread``. Reads may come from any thread; opening and closing from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from heedful_store import (
    comparisons,
    completions,
    current,
    erasure,
    fates,
    feedback,
    keys,
    projects,
    summary,
    waiting,
)
from heedful_store.ack import Ack
from heedful_store.completions import PruneReport
from heedful_store.eligibility import Fate, Profile
from heedful_store.erasure import ErasureReport
from heedful_store.fates import Judged
from heedful_store.ids import now_ms, uuid7
from heedful_store.judgements import Retraction
from heedful_store.keys import ApiKey, NewKey
from heedful_store.projects import Project
from heedful_store.records import (
    Comparison,
    Completion,
    FeedbackEvent,
    FeedbackFilter,
    RaterKind,
    Receipt,
    Scope,
    StoredFeedback,
)
from heedful_store.registry import RegistryStore
from heedful_store.summary import Summary
from heedful_store.waiting import SweepReport

PENDING_LIFETIME_MS = 10 * 60 * 1000


class Store(RegistryStore):
    """An open store. Close it, or use it as a context manager."""

    # Completions and comparisons

    def append_completion(self, completion: Completion) -> Ack[bool]:
        """Log an answer; False when it was there. Raises Invalid, AlreadyExists."""
        completions.check(completion)
        return self._writer.submit(completions.append, completion)

    def get_completion(self, scope: Scope, completion_id: str) -> Completion:
        """Return an answer; raise NotFound for an unknown or foreign one."""
        with self.read() as connection:
            return completions.get(connection, scope, completion_id)

    def get_completions(self, scope: Scope, ids: Iterable[str]) -> dict[str, Completion]:
        """Return those of the answers that exist, by id."""
        with self.read() as connection:
            return completions.get_many(connection, scope, ids)

    def remove_payload(self, scope: Scope, completion_id: str) -> Ack[bool]:
        """Remove an answer's content; False when there was none. Raises NotFound."""
        return self.write(lambda c: completions.remove_payload(c, scope, completion_id))

    def prune(self, scope: Scope, older_than_ms: int) -> Ack[PruneReport]:
        """Remove the content of unrated answers older than that, one batch; see ``more``."""
        return self.write(lambda c: completions.prune(c, scope, older_than_ms))

    def create_comparison(self, comparison: Comparison) -> Ack[bool]:
        """Log a blind set before it is shown. Raises Invalid, AlreadyExists."""
        comparisons.check(comparison)
        return self._writer.submit(comparisons.create, comparison)

    def get_comparison(self, scope: Scope, comparison_id: str) -> Comparison:
        """Return a comparison; raise NotFound for an unknown or foreign one."""
        with self.read() as connection:
            return comparisons.get(connection, scope, comparison_id)

    def next_questions(
        self, scope: Scope, *, limit: int = 1, end_user: str | None = None
    ) -> list[Comparison]:
        """Return comparisons without a vote, oldest first; see comparisons.next_unanswered."""
        with self.read() as connection:
            return comparisons.next_unanswered(connection, scope, limit=limit, end_user=end_user)

    # Feedback

    def append_feedback(
        self, event: FeedbackEvent, *, hold_unknown: bool = False, owner: str | None = None
    ) -> Ack[Receipt]:
        """Log a judgement; the receipt comes after the commit. See feedback.prepare.

        Raises Invalid at once; NotFound and AlreadyExists come out of the Ack.
        """
        prepared = feedback.prepare(event, hold_unknown=hold_unknown, owner=owner)
        return self._writer.submit(feedback.append, prepared)

    def retract_feedback(
        self,
        scope: Scope,
        feedback_id: str,
        *,
        rater_id: str,
        retraction_id: str | None = None,
        rater_kind: RaterKind = "end_user",
        key_id: str = "",
        hold_unknown: bool = False,
    ) -> Ack[Receipt]:
        """Take back an event with all its edits; ``retraction_id`` makes a retry safe."""
        event = FeedbackEvent(
            feedback_id=retraction_id or uuid7(),
            scope=scope,
            judgement=Retraction(),
            rater_id=rater_id,
            rater_kind=rater_kind,
            supersedes_id=feedback_id,
            key_id=key_id,
        )
        return self.append_feedback(event, hold_unknown=hold_unknown)

    def sweep_pending(self, lifetime_ms: int = PENDING_LIFETIME_MS) -> Ack[SweepReport]:
        """Try waiting events again and give up those older than that; call it now and then."""
        at_ms = now_ms()
        return self.write(
            lambda c: waiting.sweep(c, now_ms=at_ms, older_than_ms=at_ms - lifetime_ms)
        )

    def get_feedback(self, scope: Scope, feedback_id: str) -> StoredFeedback:
        """Return an event; raise NotFound for an unknown or foreign one."""
        with self.read() as connection:
            return current.get(connection, scope, feedback_id)

    def list_feedback(
        self, criteria: FeedbackFilter, *, after_seq: int = 0, limit: int = 100
    ) -> list[StoredFeedback]:
        """Return a page of events; the last one's ``seq`` is the next ``after_seq``."""
        with self.read() as connection:
            return current.find(connection, criteria, after_seq=after_seq, limit=limit)

    def export_feedback(self, criteria: FeedbackFilter) -> Iterator[StoredFeedback]:
        """Yield all events that match, in order of ``seq``."""
        return current.iterate(self.read, criteria)

    def feedback_since(
        self, scope: Scope, cursor: int, *, limit: int = current.PAGE_ROWS
    ) -> list[StoredFeedback]:
        """Return events after a reader's cursor (``log_seq``), retractions included."""
        with self.read() as connection:
            return current.since(connection, scope, cursor, limit=limit)

    def backlog(self, scope: Scope, cursor: int) -> int:
        """Return how many current events lie after a cursor."""
        with self.read() as connection:
            return current.backlog(connection, scope, cursor)

    def feedback_fate(self, scope: Scope, feedback_id: str, profile: Profile) -> Fate:
        """Return what became of an event; raise NotFound."""
        with self.read() as connection:
            return fates.fate_of_event(connection, scope, feedback_id, profile)

    def judged_feedback(self, scope: Scope, profile: Profile) -> Iterator[Judged]:
        """Yield every current event with its answers and its fate, in order of ``seq``."""
        return fates.iterate(self.read, scope, profile)

    def summary(self, criteria: FeedbackFilter) -> Summary:
        """Return counts for people: approval by version, tag and week, reasons, agreement."""
        with self.read() as connection:
            return summary.summarise(connection, criteria)

    # People, keys, projects

    def erase_user(self, tenant: str, end_user: str) -> Ack[ErasureReport]:
        """Remove a person's content from every table and file. Raises Invalid."""
        return self._writer.submit_alone(lambda: erasure.erase_user(self._writer, tenant, end_user))

    def create_key(
        self, scope: Scope, name: str, scopes: Iterable[str], expires_at_ms: int | None = None
    ) -> Ack[NewKey]:
        """Make an API key; its secret is in the answer only. Raises Invalid."""
        return self.write(lambda c: keys.create(c, scope, name, scopes, expires_at_ms))

    def verify_key(self, text: str) -> ApiKey | None:
        """Return the key that ``text`` is, or None."""
        with self.read() as connection:
            return keys.verify(connection, text)

    def list_keys(self, tenant: str, project: str | None = None) -> list[ApiKey]:
        """Return a tenant's keys, oldest first."""
        with self.read() as connection:
            return keys.find(connection, tenant, project)

    def revoke_key(self, tenant: str, key_id: str) -> Ack[ApiKey]:
        """Make a key invalid for good. Raises NotFound."""
        return self.write(lambda c: keys.revoke(c, tenant, key_id))

    def put_project(self, project: Project) -> Ack[None]:
        """Create a project or change its settings."""
        return self.write(lambda c: projects.put(c, project))

    def get_project(self, scope: Scope) -> Project:
        """Return a project; raise NotFound."""
        with self.read() as connection:
            return projects.get(connection, scope)

    def list_projects(self, tenant: str | None = None) -> list[Project]:
        """Return the projects of a tenant, or all."""
        with self.read() as connection:
            return projects.find(connection, tenant)


def open_store(url: str) -> Store:
    """Open the store at ``url`` (``sqlite:///FILE`` or ``postgresql://…``), migrating it first."""
    return Store(url)

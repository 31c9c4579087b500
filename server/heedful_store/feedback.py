"""Appending judgements to the log: idempotent, in order, never changed afterwards.

Owns the rules of an append: the client's id is the key, the digest tells a repetition from a
clash, an edit names what it supersedes, a retraction takes back a whole chain of edits, an event
whose target is not visible yet waits. ``current`` says what counts, ``waiting`` what happens to
those that wait. ``prepare`` is pure and runs in the caller's thread, ``append`` in the writer's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, update

from heedful_store import bulk, sequence
from heedful_store.errors import AlreadyExists, Invalid, NotFound, Rejected, StoreError
from heedful_store.ids import is_uuid7, now_ms
from heedful_store.judgements import Encoded, Ranking, Retraction, encode, ranked_ids
from heedful_store.records import FeedbackEvent, FeedbackState, Receipt
from heedful_store.schema import feedback
from heedful_store.targets import Target, Visible, look_up, mark_voted


@dataclass(frozen=True, slots=True)
class Prepared:
    """An event that was checked, with what its row needs."""

    event: FeedbackEvent
    encoded: Encoded
    digest: bytes  # SHA-256 of what the rater said
    target: Target | None  # None for a retraction
    target_id: str  # one slot per rater, target and kind; empty for a retraction
    hold_unknown: bool  # wait for a target that is not visible; else it is NotFound


@dataclass(slots=True)
class _Known:
    seq: int
    digest: bytes
    rater_id: str
    kind: str
    target_id: str
    root_id: str
    server_time_ms: int
    state: FeedbackState


Key = tuple[str, str, str]  # tenant, project, feedback id

_KNOWN_COLUMNS = (
    "tenant, project, feedback_id, seq, digest, rater_id, kind, target_id, root_id, "
    "server_time_ms, log_seq, dead_at_ms, erased_at_ms"
)
# In the order of _to_row.
_COLUMNS = (
    "seq",
    "log_seq",
    "feedback_id",
    "tenant",
    "project",
    "rater_id",
    "rater_kind",
    "kind",
    "completion_id",
    "comparison_id",
    "target_id",
    "value",
    "supersedes_id",
    "root_id",
    "consent_train",
    "tags",
    "client_time_ms",
    "server_time_ms",
    "source",
    "key_id",
    "digest",
    "owner",
)
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def prepare(
    event: FeedbackEvent, *, hold_unknown: bool = False, owner: str | None = None
) -> Prepared:
    """Check an event by itself; raise Invalid naming the field that breaks a rule.

    Args:
        event: What the client sent.
        hold_unknown: Let the event wait for a target (or a superseded event) that is not there
            yet; right only when the caller has proof that the target exists.
        owner: The end user whose answers the rater may judge; None means anybody's.
    """
    encoded = encode(event.judgement)
    if not is_uuid7(event.feedback_id):
        raise Invalid("feedback_id", "must be a UUIDv7 in lower case")
    if event.supersedes_id == event.feedback_id:
        raise Invalid("supersedes_id", "must name another event")
    digest = _digest(event, encoded)
    if isinstance(event.judgement, Retraction):
        if event.supersedes_id is None or event.completion_id or event.comparison_id:
            raise Invalid("supersedes_id", "a retraction names an event and nothing else")
        return Prepared(event, encoded, digest, None, "", hold_unknown)
    completion_ids, target_id = _target_of(event)
    target = Target(event.scope, completion_ids, event.comparison_id, owner)
    return Prepared(event, encoded, digest, target, target_id, hold_unknown)


def append(connection: Connection, items: Sequence[Prepared]) -> list[Receipt | StoreError]:
    """Store a group of events; each gets its receipt or its own refusal."""
    last = sequence.lock(connection)
    known = _known(connection, items)
    visible = look_up(connection, [item.target for item in items if item.target is not None])
    server_time_ms = now_ms()
    outcomes: list[Receipt | StoreError] = []
    fresh: list[tuple[Prepared, _Known]] = []
    for item in items:
        key = _key(item, item.event.feedback_id)
        if key in known:
            outcomes.append(_repeated(item, known[key]))
            continue
        try:
            entry = _admit(item, known, visible, last + 1, server_time_ms)
        except Rejected as refusal:
            outcomes.append(refusal)
            continue
        last += 1
        known[key] = entry
        fresh.append((item, entry))
        outcomes.append(_receipt(item, entry, duplicate=False))
    if fresh:
        sequence.advance(connection, last)
        _insert(connection, fresh)
    return outcomes


def _admit(
    item: Prepared, known: dict[Key, _Known], visible: Visible, seq: int, server_time_ms: int
) -> _Known:
    """Return the entry of a new event; raise NotFound or Invalid where it has no right to one."""
    root_id = _root_of(item, known)
    is_visible = item.target is None or visible.admits(item.target)
    if not is_visible and not item.hold_unknown:
        raise NotFound("the answer or comparison that is judged")
    return _Known(
        seq=seq,
        digest=item.digest,
        rater_id=item.event.rater_id,
        kind=item.encoded.kind,
        target_id=item.target_id,
        root_id=root_id,
        server_time_ms=server_time_ms,
        state="stored" if is_visible else "pending",
    )


def _target_of(event: FeedbackEvent) -> tuple[tuple[str, ...], str]:
    """Return the completions that an event is about, and the name of its slot."""
    if isinstance(event.judgement, Ranking):
        if event.completion_id is not None:
            raise Invalid("completion_id", "a ranking names its completions in its groups")
        names = ranked_ids(event.judgement)
        if event.comparison_id is not None:
            return names, event.comparison_id
        # Without a comparison the set itself is the target, in whatever order it was ranked.
        return names, hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    if not event.completion_id:
        raise Invalid("completion_id", "is needed for this kind of feedback")
    if event.comparison_id is not None:
        raise Invalid("comparison_id", "only a ranking judges a comparison")
    return (event.completion_id,), event.completion_id


def _digest(event: FeedbackEvent, encoded: Encoded) -> bytes:
    said = (
        encoded.kind,
        encoded.value,
        encoded.text,
        event.comment,
        event.rater_id,
        event.rater_kind,
        event.completion_id,
        event.comparison_id,
        event.supersedes_id,
        event.consent_train,
        sorted(event.tags) if event.tags else (),
    )
    return hashlib.sha256(_to_json(said).encode()).digest()


def _key(item: Prepared, feedback_id: str) -> Key:
    return (item.event.scope.tenant, item.event.scope.project, feedback_id)


def _repeated(item: Prepared, entry: _Known) -> Receipt | StoreError:
    if entry.digest != item.digest:
        return AlreadyExists(f"feedback {item.event.feedback_id}")
    return _receipt(item, entry, duplicate=True)


def _receipt(item: Prepared, entry: _Known, *, duplicate: bool) -> Receipt:
    return Receipt(item.event.feedback_id, entry.seq, entry.server_time_ms, duplicate, entry.state)


def _root_of(item: Prepared, known: dict[Key, _Known]) -> str:
    """Return the first event of the chain that ``item`` continues, itself when it starts one."""
    superseded_id = item.event.supersedes_id
    if superseded_id is None:
        return item.event.feedback_id
    superseded = known.get(_key(item, superseded_id))
    if superseded is None:
        if not item.hold_unknown:
            raise NotFound(f"feedback {superseded_id}")
        return superseded_id
    if superseded.rater_id != item.event.rater_id:
        raise NotFound(f"feedback {superseded_id}")
    if superseded.kind == "retraction":
        raise Invalid("supersedes_id", "names a retraction, which is final")
    same = (superseded.kind, superseded.target_id) == (item.encoded.kind, item.target_id)
    if item.target is not None and not same:
        raise Invalid("supersedes_id", "names feedback of another kind or on another answer")
    return superseded.root_id


def _known(connection: Connection, items: Sequence[Prepared]) -> dict[Key, _Known]:
    names = {item.event.feedback_id for item in items}
    names.update(item.event.supersedes_id for item in items if item.event.supersedes_id)
    known: dict[Key, _Known] = {}
    for (
        tenant,
        project,
        name,
        seq,
        digest,
        rater,
        kind,
        target,
        root,
        at_ms,
        *marks,
    ) in bulk.select_by_name(connection, _KNOWN_COLUMNS, "feedback", "feedback_id", names):
        state = state_of(*marks)
        known[tenant, project, name] = _Known(
            seq, bytes(digest), rater, kind, target, root, at_ms, state
        )
    return known


def state_of(
    log_seq: int | None, dead_at_ms: int | None, erased_at_ms: int | None
) -> FeedbackState:
    """Return the state that a row's three marks mean."""
    if erased_at_ms is not None:
        return "erased"
    if dead_at_ms is not None:
        return "dead"
    return "pending" if log_seq is None else "stored"


def _insert(connection: Connection, fresh: Sequence[tuple[Prepared, _Known]]) -> None:
    rows = [_to_row(item, entry) for item, entry in fresh]
    bulk.insert_rows(connection, "feedback", _COLUMNS, rows)
    payloads: list[tuple[bulk.Value, ...]] = [
        (entry.seq, item.encoded.text, item.event.comment)
        for item, entry in fresh
        if item.encoded.text is not None or item.event.comment is not None
    ]
    bulk.insert_rows(connection, "feedback_payloads", ("seq", "text", "comment"), payloads)
    targets: list[tuple[bulk.Value, ...]] = [
        (entry.seq, name) for item, entry in fresh for name in ranked_ids(item.event.judgement)
    ]
    bulk.insert_rows(connection, "feedback_targets", ("seq", "completion_id"), targets)
    voted = [
        item.event.comparison_id
        for item, entry in fresh
        if item.event.comparison_id is not None and entry.state == "stored"
    ]
    if voted:
        mark_voted(connection, voted, fresh[0][1].server_time_ms)
    _join_chains(connection, fresh)


def _join_chains(connection: Connection, fresh: Iterable[tuple[Prepared, _Known]]) -> None:
    """Give later members of a chain their true root, where they came before its middle."""
    for item, entry in fresh:
        if entry.root_id == item.event.feedback_id:
            continue
        f = feedback.c
        connection.execute(
            update(feedback)
            .where(
                f.tenant == item.event.scope.tenant,
                f.project == item.event.scope.project,
                f.root_id == item.event.feedback_id,
                f.supersedes_id.is_not(None),
            )
            .values(root_id=entry.root_id)
        )


def _to_row(item: Prepared, entry: _Known) -> tuple[bulk.Value, ...]:
    event = item.event
    return (
        entry.seq,
        entry.seq if entry.state == "stored" else None,
        event.feedback_id,
        event.scope.tenant,
        event.scope.project,
        event.rater_id,
        event.rater_kind,
        item.encoded.kind,
        event.completion_id,
        event.comparison_id,
        item.target_id,
        item.encoded.value,
        event.supersedes_id,
        entry.root_id,
        event.consent_train,
        json.dumps(event.tags) if event.tags else "[]",
        event.client_time_ms,
        entry.server_time_ms,
        event.source,
        event.key_id,
        item.digest,
        item.target.owner if item.target is not None else None,
    )

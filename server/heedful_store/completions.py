"""The log of answers: append, read, prune.

Owns the translation between Completion values and their two tables, and the rule of retention. It
does not know feedback's rules; ``waiting.resolve_waiting`` is told which answers became visible.
Functions take a connection: writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, exists, insert, or_, select, update

from heedful_store import bulk
from heedful_store.blobs import pack_float32, pack_int32, unpack_float32, unpack_int32
from heedful_store.errors import AlreadyExists, Invalid, NotFound, StoreError
from heedful_store.ids import now_ms
from heedful_store.records import Completion, CompletionPayload, Consent, Scope
from heedful_store.schema import (
    comparison_candidates,
    completion_payloads,
    completions,
    feedback,
    feedback_targets,
)
from heedful_store.waiting import resolve_waiting

PRUNE_BATCH = 500


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What one pass of retention did."""

    payloads_removed: int  # content gone, the row stays
    more: bool  # a further pass would find more


def prompt_hash(prompt_ids: Sequence[int]) -> str:
    """Return the SHA-256 of a prompt's token ids, the key by which prompts are grouped."""
    return hashlib.sha256(array("i", prompt_ids).tobytes()).hexdigest()


def check(completion: Completion) -> None:
    """Raise Invalid where a completion's payload contradicts its consent or its own lengths."""
    if completion.consent.log == "none":
        raise Invalid("consent.log", "an answer that may not be logged must not reach the store")
    payload = completion.payload
    if payload is None:
        return
    if completion.consent.log != "full":
        raise Invalid("consent.log", "content may be stored only with consent full")
    expected = len(payload.completion_ids)
    for name in ("logprobs", "sampling_logprobs", "kept_mass"):
        if len(getattr(payload, name)) not in (0, expected):
            raise Invalid(f"payload.{name}", f"must have {expected} values or none")


def append(connection: Connection, items: Sequence[Completion]) -> list[bool | StoreError]:
    """Store answers; True for a new one, False for a repetition, AlreadyExists for a clash."""
    known = _owners(connection, {item.completion_id for item in items})
    outcomes: list[bool | StoreError] = []
    fresh: list[Completion] = []
    for item in items:
        owner = known.get(item.completion_id)
        if owner is None:
            known[item.completion_id] = (item.scope.tenant, item.scope.project)
            fresh.append(item)
            outcomes.append(True)
        elif owner == (item.scope.tenant, item.scope.project):
            outcomes.append(False)
        else:
            outcomes.append(AlreadyExists())
    if fresh:
        connection.execute(insert(completions), [_to_row(item) for item in fresh])
        payloads = [_payload_to_row(c.completion_id, c.payload) for c in fresh if c.payload]
        if payloads:
            connection.execute(insert(completion_payloads), payloads)
        resolve_waiting(connection, completion_ids=[item.completion_id for item in fresh])
    return outcomes


def get(connection: Connection, scope: Scope, completion_id: str) -> Completion:
    """Return one answer and what is left of its content; raise NotFound, also for a foreign one."""
    found = get_many(connection, scope, [completion_id])
    if not found:
        raise NotFound(f"completion {completion_id}")
    return found[completion_id]


def get_many(
    connection: Connection, scope: Scope, completion_ids: Iterable[str]
) -> dict[str, Completion]:
    """Return those of the answers that exist in ``scope``, by id."""
    joined = completions.outerjoin(
        completion_payloads, completions.c.completion_id == completion_payloads.c.completion_id
    )
    query = (
        select(completions, *_PAYLOAD_COLUMNS)
        .select_from(joined)
        .where(
            completions.c.completion_id.in_(list(completion_ids)),
            completions.c.tenant == scope.tenant,
            completions.c.project == scope.project,
        )
    )
    return {row.completion_id: _from_row(row) for row in connection.execute(query)}


def remove_payload(connection: Connection, scope: Scope, completion_id: str) -> bool:
    """Remove the content of one answer; False when there was none, NotFound for no such answer."""
    mine = and_(
        completions.c.completion_id == completion_id,
        completions.c.tenant == scope.tenant,
        completions.c.project == scope.project,
    )
    if connection.execute(select(completions.c.completion_id).where(mine)).first() is None:
        raise NotFound(f"completion {completion_id}")
    return _remove_payloads(connection, [completion_id]) > 0


def prune(connection: Connection, scope: Scope, older_than_ms: int) -> PruneReport:
    """Remove the content of unrated answers made before ``older_than_ms``, one batch of them."""
    rated = or_(
        exists().where(feedback.c.target_id == completions.c.completion_id),
        exists().where(feedback_targets.c.completion_id == completions.c.completion_id),
        # An answer shown in a voted comparison is part of that vote, also where it was not ranked.
        exists().where(
            comparison_candidates.c.completion_id == completions.c.completion_id,
            feedback.c.target_id == comparison_candidates.c.comparison_id,
        ),
    )
    query = (
        select(completions.c.completion_id)
        .join(
            completion_payloads, completion_payloads.c.completion_id == completions.c.completion_id
        )
        .where(
            completions.c.tenant == scope.tenant,
            completions.c.project == scope.project,
            completions.c.created_at_ms < older_than_ms,
            ~rated,
        )
        .order_by(completions.c.created_at_ms)
        .limit(PRUNE_BATCH + 1)
    )
    found = list(connection.scalars(query))
    removed = _remove_payloads(connection, found[:PRUNE_BATCH])
    return PruneReport(removed, len(found) > PRUNE_BATCH)


def _remove_payloads(connection: Connection, completion_ids: Sequence[str]) -> int:
    removed = connection.execute(
        delete(completion_payloads).where(completion_payloads.c.completion_id.in_(completion_ids))
    ).rowcount
    # The hash of a short prompt would give the prompt away to anyone who guesses it.
    connection.execute(
        update(completions)
        .where(completions.c.completion_id.in_(completion_ids))
        .values(prompt_hash="", payload_removed_at_ms=now_ms())
    )
    return removed


def _owners(connection: Connection, completion_ids: set[str]) -> dict[str, tuple[str, str]]:
    rows = bulk.select_by_name(
        connection,
        "completion_id, tenant, project",
        "completions",
        "completion_id",
        completion_ids,
    )
    return {row[0]: (row[1], row[2]) for row in rows}


_PAYLOAD_COLUMNS = [column for column in completion_payloads.c if column.name != "completion_id"]


def _to_row(item: Completion) -> dict[str, Any]:
    return {
        "completion_id": item.completion_id,
        "tenant": item.scope.tenant,
        "project": item.scope.project,
        "end_user": item.end_user,
        "conversation_id": item.conversation_id,
        "request_id": item.request_id,
        "sample_idx": item.sample_idx,
        "origin": item.origin,
        "policy_version": item.policy_version,
        "policy_hash": item.policy_hash,
        "base_id": item.base_id,
        "template_hash": item.template_hash,
        "quantization": item.quantization,
        "kernel_path": item.kernel_path,
        "sampling": json.dumps(item.sampling, sort_keys=True),
        "seed": item.seed,
        "finish_reason": item.finish_reason,
        "prompt_tokens": item.prompt_tokens,
        "completion_tokens": item.completion_tokens,
        "consent_log": item.consent.log,
        "consent_train": item.consent.train,
        "tags": json.dumps(item.tags),
        "prompt_hash": prompt_hash(item.payload.prompt_ids) if item.payload else "",
        "created_at_ms": item.created_at_ms,
    }


def _payload_to_row(completion_id: str, payload: CompletionPayload) -> dict[str, Any]:
    return {
        "completion_id": completion_id,
        "prompt_ids": pack_int32(payload.prompt_ids),
        "completion_ids": pack_int32(payload.completion_ids),
        "prompt_text": payload.prompt_text,
        "completion_text": payload.completion_text,
        "messages": payload.messages,
        "logprobs": pack_float32(payload.logprobs),
        "sampling_logprobs": pack_float32(payload.sampling_logprobs),
        "kept_mass": pack_float32(payload.kept_mass),
    }


def _payload_from_row(row: Row[Any]) -> CompletionPayload | None:
    if row.prompt_ids is None:
        return None
    return CompletionPayload(
        prompt_ids=unpack_int32(row.prompt_ids),
        completion_ids=unpack_int32(row.completion_ids),
        prompt_text=row.prompt_text,
        completion_text=row.completion_text,
        messages=row.messages,
        logprobs=unpack_float32(row.logprobs),
        sampling_logprobs=unpack_float32(row.sampling_logprobs),
        kept_mass=unpack_float32(row.kept_mass),
    )


def _from_row(row: Row[Any]) -> Completion:
    return Completion(
        completion_id=row.completion_id,
        scope=Scope(row.tenant, row.project),
        policy_version=row.policy_version,
        created_at_ms=row.created_at_ms,
        end_user=row.end_user,
        conversation_id=row.conversation_id,
        request_id=row.request_id,
        sample_idx=row.sample_idx,
        origin=row.origin,
        policy_hash=row.policy_hash,
        base_id=row.base_id,
        template_hash=row.template_hash,
        quantization=row.quantization,
        kernel_path=row.kernel_path,
        sampling=json.loads(row.sampling),
        seed=row.seed,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        consent=Consent(row.consent_log, row.consent_train),
        tags=tuple(json.loads(row.tags)),
        prompt_hash=row.prompt_hash,
        payload=_payload_from_row(row),
        erased_at_ms=row.erased_at_ms,
    )

"""Existing preference data as if it had been collected here.

Owns the translation of a record into answers and one judgement. Every id is derived from the name
of the source and of the record, so that an import can be repeated: a record with the same id and
another content is refused. What people wrote is tokenized once and closed by the end token. A
demonstration is an answer of human origin whose correction repeats it. Event loop; texts are
tokenized and the store is read in worker threads.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterable, Sequence

from heedful_store import (
    AlreadyExists,
    Completion,
    CompletionPayload,
    Correction,
    FeedbackEvent,
    Judgement,
    Ranking,
    Receipt,
    Scope,
    Store,
    StoreError,
    Thumb,
    now_ms,
)

from heedful_server.errors import HeedfulServerError
from heedful_server.feedback.desk import Outcome
from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.feedback.submission import Demonstration, ImportedItem, Order
from heedful_server.rpc.requests import ChatPrompt, ScoringItem, TextPrompt, TokensPrompt
from heedful_server.rpc.text_pool import TextPool

IMPORT_VERSION = "import"
_LOOK_UP = 500


class Importer:
    """Writes records of existing data to the log."""

    def __init__(
        self,
        store: Store,
        text: TextPool,
        metrics: FeedbackMetrics,
        base_id: str,
        template_hash: str,
    ) -> None:
        self._store = store
        self._text = text
        self._metrics = metrics
        self._base_id = base_id
        self._template_hash = template_hash

    async def import_items(
        self,
        scope: Scope,
        source: str,
        key_id: str,
        items: Sequence[ImportedItem | HeedfulServerError],
    ) -> list[Outcome]:
        """Log records in their order; each has its own outcome, errors pass through."""
        good = [item for item in items if isinstance(item, ImportedItem)]
        known = await asyncio.to_thread(self._known, scope, source, good)
        outcomes: list[Outcome] = []
        for item in items:
            if isinstance(item, HeedfulServerError):
                outcomes.append(item)
                continue
            try:
                outcomes.append(await self._import(scope, source, key_id, item, known))
            except (HeedfulServerError, StoreError) as error:
                self._metrics.refused.labels(type(error).__name__).inc()
                outcomes.append(error)
        return outcomes

    async def _import(
        self,
        scope: Scope,
        source: str,
        key_id: str,
        item: ImportedItem,
        known: dict[str, Completion],
    ) -> Receipt:
        answers = await self._answers(scope, source, item)
        for answer in answers:
            before = known.get(answer.completion_id)
            if before is not None and not _is_same(before, answer):
                raise AlreadyExists(f"record {item.import_id[:80]!r} of this source")
        known.update((answer.completion_id, answer) for answer in answers)
        for ack in [self._store.append_completion(answer) for answer in answers]:
            await ack
        ids = [answer.completion_id for answer in answers]
        judgement = _judgement(item, ids)
        event = FeedbackEvent(
            feedback_id=derived_id(scope, source, item.import_id, "feedback"),
            scope=scope,
            judgement=judgement,
            rater_id=item.rater_id,
            # Whoever imports data answers for it, so raters' caps do not apply.
            rater_kind="operator",
            completion_id=None if isinstance(judgement, Ranking) else ids[0],
            tags=item.tags,
            source=f"import:{source}",
            key_id=key_id,
        )
        receipt = await self._store.append_feedback(event)
        status = "duplicate" if receipt.duplicate else receipt.state
        self._metrics.count_event(type(judgement).__name__.lower(), "operator", status)
        return receipt

    async def _answers(self, scope: Scope, source: str, item: ImportedItem) -> list[Completion]:
        prompt_ids, prompt_text, messages = await self._prompt(item)
        answers = []
        for index, text in enumerate(item.texts):
            asked = ScoringItem(item.prompt, TextPrompt(text))
            completion_ids = await self._text.encode_completion(asked)
            answers.append(
                Completion(
                    completion_id=derived_id(scope, source, item.import_id, str(index)),
                    scope=scope,
                    policy_version=IMPORT_VERSION,
                    created_at_ms=now_ms(),
                    sample_idx=index,
                    origin="human" if isinstance(item.judgement, Demonstration) else "imported",
                    base_id=self._base_id,
                    template_hash=self._template_hash,
                    prompt_tokens=len(prompt_ids),
                    completion_tokens=len(completion_ids),
                    tags=item.tags,
                    payload=CompletionPayload(
                        prompt_ids=prompt_ids,
                        completion_ids=completion_ids,
                        prompt_text=prompt_text,
                        completion_text=text,
                        messages=messages,
                    ),
                )
            )
        return answers

    async def _prompt(self, item: ImportedItem) -> tuple[list[int], str, str | None]:
        prompt = item.prompt
        if isinstance(prompt, TokensPrompt):
            token_ids = list(prompt.token_ids)
            return token_ids, await self._text.decode(token_ids, False), None
        token_ids, text = await self._text.encode_and_render(prompt, f"{item.path}prompt")
        if not isinstance(prompt, ChatPrompt):
            return token_ids, text, None
        turns = [{"role": role, "content": content} for role, content in prompt.messages]
        return token_ids, text, json.dumps(turns, ensure_ascii=False)

    def _known(
        self, scope: Scope, source: str, items: Iterable[ImportedItem]
    ) -> dict[str, Completion]:
        """Return the answers of earlier imports that these records name."""
        ids = [
            derived_id(scope, source, item.import_id, str(index))
            for item in items
            for index in range(len(item.texts))
        ]
        known: dict[str, Completion] = {}
        for start in range(0, len(ids), _LOOK_UP):
            known |= self._store.get_completions(scope, ids[start : start + _LOOK_UP])
        return known


def derived_id(scope: Scope, source: str, import_id: str, part: str) -> str:
    """Return the UUIDv7 (of time 0) that always stands for one part of a record."""
    names = json.dumps([scope.tenant, scope.project, source, import_id, part])
    random = int.from_bytes(hashlib.sha256(names.encode()).digest()[:10], "big")
    bits = 0x7 << 76 | (random >> 62 & 0xFFF) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _judgement(item: ImportedItem, ids: Sequence[str]) -> Judgement:
    match item.judgement:
        case Order(groups):
            return Ranking(tuple(tuple(ids[i] for i in group) for group in groups))
        case Demonstration():
            return Correction(item.texts[0])
        case Thumb():
            return item.judgement


def _is_same(before: Completion, answer: Completion) -> bool:
    old, new = before.payload, answer.payload
    # Content that was erased or removed does not come back by way of an import.
    if old is None or new is None:
        return False
    return (old.prompt_text, old.completion_text) == (new.prompt_text, new.completion_text)

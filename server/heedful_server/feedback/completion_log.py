"""The log of answers: each gets its row before its last message leaves, as far as consent allows.

Owns the decision what is kept of an answer, the translation of a finished or cut answer into the
store's row, and the bound on waiting for it: an answer is never refused because it cannot be
logged, it only cannot be rated. It knows nothing of messages. Event loop; the store writes in its
own thread.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from heedful_store import Completion, CompletionPayload, Consent, Scope, Store, StoreError, now_ms

from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.feedback.recent import RecentAnswers
from heedful_server.feedback.tokens import Tokens
from heedful_server.protocol import Delta, SamplingParams
from heedful_server.rpc.parts import Part, Served
from heedful_server.rpc.requests import ChatPrompt, GenerationRequest, Origin

LogConsent = Literal["none", "metadata", "full"]
CutReason = Literal["cancelled", "error"]

_WIDTH: dict[LogConsent, int] = {"none": 0, "metadata": 1, "full": 2}
# What a request says in its sampling parameters, beside numbers.
_WORDS = ("stop", "stop_token_ids", "logit_bias")
_SIGN_BIT, _SEED_RANGE = 1 << 63, 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """The server's own setting, which a request can only narrow."""

    consent: Consent
    timeout_s: float
    base_id: str
    template_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """One request being answered, with all that the rows of its answers need."""

    scope: Scope
    request: GenerationRequest
    served: Served
    completion_ids: tuple[str, ...]
    prompt_ids: Sequence[int]
    prompt_text: str
    sampling: SamplingParams
    kernel_path: str
    received_at_s: float


class CompletionLog:
    """Writes answers to the store and remembers which ones it did not."""

    def __init__(
        self,
        store: Store,
        tokens: Tokens,
        metrics: FeedbackMetrics,
        recent: RecentAnswers,
        settings: LogSettings,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._metrics = metrics
        self._recent = recent
        self._settings = settings
        self._late: set[asyncio.Task[bool]] = set()
        self.disk_is_low = False

    def consent_for(self, origin: Origin) -> Consent:
        """Return what may be done with a request: the server's setting, narrowed by its own."""
        server = self._settings.consent
        asked = origin.log_consent
        log = server.log if asked == "server" else min(asked, server.log, key=_WIDTH.__getitem__)
        return Consent(log=log, train=server.train and origin.train_consent != "no")

    def open(self, answering: Answering) -> "LogEntry":
        """Return the entry of a request; its tokens go out in the first message."""
        origin = answering.request.origin
        consent = self.consent_for(origin)
        reason = self._refusal(origin, consent)
        if reason:
            self._note_unlogged(answering, reason)
            return LogEntry(self, answering, Consent(log="none", train=False))
        for completion_id in answering.completion_ids:
            self._recent.end_users.put(completion_id, (answering.scope, origin.end_user))
        return LogEntry(self, answering, consent)

    def token(self, answering: Answering, completion_id: str) -> str:
        """Return the token that lets the receiver of an answer rate it."""
        return self._tokens.sign(
            "completion",
            completion_id,
            tenant=answering.scope.tenant,
            project=answering.scope.project,
            end_user=answering.request.origin.end_user,
            policy_version=answering.served.policy_version,
        )

    async def write(self, completion: Completion) -> bool:
        """Log an answer; False where that fails or takes too long."""
        try:
            ack = self._store.append_completion(completion)
            async with asyncio.timeout(self._settings.timeout_s):
                await ack
        except TimeoutError:
            return self._failed(completion, "timeout")
        except StoreError as error:
            return self._failed(completion, _snake_case(type(error).__name__))
        self._metrics.completions.labels(completion.consent.log).inc()
        return True

    def write_later(self, completion: Completion) -> None:
        """Log an answer that nobody waits for."""
        task = asyncio.get_running_loop().create_task(self.write(completion))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def drain(self) -> None:
        """Wait for the writes that nobody waited for."""
        while self._late:
            await asyncio.wait(self._late)

    def row(self, answering: Answering, consent: Consent, part: Part, cut: CutReason) -> Completion:
        """Return the row of an answer; `cut` says why it ended where the engine did not."""
        origin, finish, served = answering.request.origin, part.finish, answering.served
        num_tokens = finish.completion_tokens if finish else len(part.token_ids)
        is_full = consent.log == "full"
        seed = served.seed
        return Completion(
            completion_id=answering.completion_ids[part.index],
            scope=answering.scope,
            policy_version=served.policy_version,
            policy_hash=served.policy_hash,
            created_at_ms=now_ms(),
            end_user=origin.end_user,
            conversation_id=origin.conversation_id,
            request_id=served.request_id,
            sample_idx=part.index,
            base_id=self._settings.base_id,
            template_hash=self._settings.template_hash,
            quantization=served.quantization,
            kernel_path=answering.kernel_path,
            sampling=_sampling(answering, part, is_full),
            seed=seed - _SEED_RANGE if seed >= _SIGN_BIT else seed,
            finish_reason=finish.reason if finish else cut,
            prompt_tokens=len(answering.prompt_ids),
            completion_tokens=num_tokens,
            consent=consent,
            tags=origin.tags,
            payload=_payload(answering, part) if is_full else None,
        )

    def _refusal(self, origin: Origin, consent: Consent) -> str:
        if origin.rollout:
            return "rollout"
        if consent.log == "none":
            return "consent"
        if self.disk_is_low:
            return "disk_low"
        return "store_dead" if self._store.death is not None else ""

    def _failed(self, completion: Completion, reason: str) -> bool:
        self._recent.unlogged.put(completion.completion_id, completion.scope)
        self._metrics.unlogged.labels(reason).inc()
        return False

    def _note_unlogged(self, answering: Answering, reason: str) -> None:
        for completion_id in answering.completion_ids:
            self._recent.unlogged.put(completion_id, answering.scope)
        self._metrics.unlogged.labels(reason).inc(len(answering.completion_ids))


class LogEntry:
    """The answers of one request on their way into the log."""

    def __init__(self, log: CompletionLog, answering: Answering, consent: Consent) -> None:
        self.consent = consent
        self.rateable = consent.log != "none"
        self.answering = answering
        ids = answering.completion_ids
        self.tokens = tuple(log.token(answering, i) if self.rateable else "" for i in ids)
        self._log = log
        # Kept apart from what the caller is sent, which leaves in pieces.
        self._parts = [Part(index) for index in range(len(ids))] if self.rateable else []
        self._open = set(range(len(self._parts)))

    def add(self, delta: Delta) -> None:
        """Take up more of one answer."""
        if self.rateable:
            self._parts[delta.index].add(delta)

    async def write(self, index: int) -> bool:
        """Log an answer that has ended; return whether it can be rated."""
        if index not in self._open:
            return False
        self._open.remove(index)
        return await self._log.write(self._row(index, "cancelled"))

    def keep_only(self, indices: Iterable[int]) -> None:
        """Leave the other answers out of the log: they were never shown to anybody."""
        self._open.intersection_update(indices)

    def cut(self, reason: CutReason) -> None:
        """Log what there is of the answers that will not end."""
        for index in sorted(self._open):
            self._log.write_later(self._row(index, reason))
        self._open.clear()

    def _row(self, index: int, cut: CutReason) -> Completion:
        return self._log.row(self.answering, self.consent, self._parts[index], cut)


def _sampling(answering: Answering, part: Part, is_full: bool) -> Mapping[str, object]:
    values: dict[str, object] = msgspec.structs.asdict(answering.sampling)
    del values["seed"]
    if not is_full:
        for word in _WORDS:
            del values[word]
    constraint = answering.request.constraint
    if answering.request.best_of:
        values["best_of"] = answering.request.best_of
    values["constraint"] = constraint.kind if constraint else None
    values["duration_s"] = round(time.monotonic() - answering.received_at_s, 6)
    if part.finish is not None:
        values["cached_prompt_tokens"] = part.finish.cached_prompt_tokens
        if is_full:
            values["stopped_by"] = part.finish.stop
    return values


def _payload(answering: Answering, part: Part) -> CompletionPayload:
    prompt = answering.request.prompt
    messages = None
    if isinstance(prompt, ChatPrompt):
        turns = [{"role": role, "content": content} for role, content in prompt.messages]
        messages = json.dumps(turns, ensure_ascii=False)
    return CompletionPayload(
        prompt_ids=answering.prompt_ids,
        completion_ids=part.token_ids,
        prompt_text=_storable(answering.prompt_text),
        completion_text=_storable("".join(part.texts)),
        messages=messages,
        logprobs=part.logprobs,
        sampling_logprobs=part.sampling_logprobs,
        kept_mass=part.kept_mass,
    )


def _storable(text: str) -> str:
    # PostgreSQL's texts have no place for NUL, which a model may well sample; the ids keep it.
    return text.replace("\0", "\ufffd")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()

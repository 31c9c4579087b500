"""The application layer: validated requests in, generations and scores out.

Owns the steps between a validated request and the engine: admission, tokenizing, the checks that
need the model, the deadline and the submission. It knows nothing of protobuf or gRPC: servicers
and the HTTP façade both call it. Runs on the event loop.
"""

import secrets
import time
from dataclasses import dataclass

import msgspec
from heedful_store import Scope, uuid7

from heedful_server.engine_client.client import EngineClient
from heedful_server.engine_client.stream import EngineStream
from heedful_server.errors import DeadlineExceeded, EngineUnavailable
from heedful_server.feedback.access import scope_of
from heedful_server.feedback.completion_log import Answering, CompletionLog
from heedful_server.identity import TRAIN
from heedful_server.metrics import Metrics
from heedful_server.protocol import EngineInfo, Score, ScoreItem, Submit
from heedful_server.readiness import Readiness
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.call import Call, caller
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.model_rules import (
    ModelLimits,
    require_completion_fits,
    require_prompt_fits,
    require_token_ids_known,
    resolve_max_tokens,
)
from heedful_server.rpc.parts import Served
from heedful_server.rpc.requests import (
    GenerationRequest,
    ScoringItem,
    ScoringRequest,
    TokensPrompt,
)
from heedful_server.rpc.text_pool import TextPool
from heedful_server.rpc.validate import BASE_VERSION
from heedful_server.security.quota import Quota

# A seed that the server draws is exact as a JSON number too.
_SEED_BITS = 53
# The engine gives up before the caller does, so that a partial answer can still arrive.
_DEADLINE_MARGIN_SHARE = 0.1
_MAX_DEADLINE_MARGIN_S = 0.5


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """A completion's tokens and the log-prob of each."""

    token_ids: list[int]
    logprobs: list[float]


class Generator:
    """Starts generations and scores on one engine."""

    def __init__(
        self,
        engine: EngineClient,
        readiness: Readiness,
        text: TextPool,
        admission: Admission,
        metrics: Metrics,
        log: CompletionLog,
        quota: Quota,
        model_name: str,
    ) -> None:
        self._engine = engine
        self._readiness = readiness
        self._text = text
        self._admission = admission
        self._metrics = metrics
        self._log = log
        self._quota = quota
        self._model_name = model_name
        self._running: set[Generation] = set()

    async def start(self, request: GenerationRequest, call: Call) -> Generation:
        """Tokenize, check and submit a request; the caller must enter and leave the result.

        Raises:
            InvalidRequest: the prompt or a token id does not fit the model.
            EngineUnavailable: the engine does not serve.
            QueueFull: too much is in flight, or more than the tenant's quota.
            DeadlineExceeded: the deadline has passed.
            PermissionDenied: the purpose is one that the caller may not have.
        """
        scope = _scope(request)
        info = self._require_engine()
        require_token_ids_known(request, info.vocab_size)
        self._admission.admit(request.n)
        try:
            submit, prompt_text = await self._submission(request, info, call)
            stream = self._submit(submit, scope.tenant)
        except BaseException:
            self._admission.release(request.n)
            raise
        self._observe(request, submit)
        answering = Answering(
            scope=scope,
            request=request,
            served=self._served(info, submit.sampling.seed, call),
            completion_ids=(submit.request_id, *(uuid7() for _ in range(request.n - 1))),
            prompt_ids=submit.prompt_token_ids,
            prompt_text=prompt_text,
            sampling=submit.sampling,
            kernel_path=info.kernel_path,
            received_at_s=call.received_at_s,
        )
        return self._begin(answering, stream)

    def _submit(self, submit: Submit, tenant: str) -> EngineStream:
        """Hand a request to the engine, charged in full."""
        charge = len(submit.prompt_token_ids) + submit.n * submit.sampling.max_tokens
        self._quota.take(tenant, charge)
        try:
            return self._engine.submit(submit)
        except BaseException:
            self._quota.give_back(tenant, charge)
            raise

    def _begin(self, answering: Answering, stream: EngineStream) -> Generation:
        def on_end(generation: Generation) -> None:
            self._running.discard(generation)
            charged = generation.request.n * answering.sampling.max_tokens
            self._quota.give_back(answering.scope.tenant, charged - generation.num_tokens)

        generation = Generation(
            request=answering.request,
            served=answering.served,
            completion_ids=answering.completion_ids,
            entry=self._log.open(answering),
            stream=stream,
            admission=self._admission,
            metrics=self._metrics,
            received_at_s=answering.received_at_s,
            on_end=on_end,
        )
        self._running.add(generation)
        return generation

    async def score(self, request: ScoringRequest, call: Call) -> list[ScoredItem]:
        """Return the log-probs of given completions; raises as start does."""
        info = self._require_engine()
        num_items = len(request.items)
        self._admission.admit(num_items)
        try:
            model = ModelLimits(info.vocab_size, info.context_tokens)
            items = [
                await self._score_item(item, f"items[{i}]", model)
                for i, item in enumerate(request.items)
            ]
            num_tokens = sum(len(i.prompt_token_ids) + len(i.completion_token_ids) for i in items)
            self._quota.take(caller().tenant, num_tokens)
            scored = await self._engine.score(
                Score(
                    request_id=uuid7(),
                    items=items,
                    priority=request.priority,
                    deadline_s=_engine_deadline_s(call),
                    policy=BASE_VERSION,
                )
            )
        finally:
            self._admission.release(num_items)
        return [
            ScoredItem(item.completion_token_ids, values)
            for item, values in zip(items, scored.logprobs, strict=True)
        ]

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and completion together; raises EngineUnavailable until known."""
        if self._engine.info is None:
            raise EngineUnavailable(self._readiness.reason())
        return self._engine.info.context_tokens

    @property
    def num_running(self) -> int:
        """Generations in flight."""
        return len(self._running)

    def cancel_all(self) -> None:
        """End every running generation; callers get what there is, marked as cancelled."""
        for generation in self._running:
            generation.cancel()

    def _require_engine(self) -> EngineInfo:
        reason = self._readiness.reason()
        if reason or self._engine.info is None:
            raise EngineUnavailable(reason)
        return self._engine.info

    async def _submission(
        self, request: GenerationRequest, info: EngineInfo, call: Call
    ) -> tuple[Submit, str]:
        """Return what the engine is told, and the text of the prompt where it will be logged."""
        token_ids, prompt_text = await self._encode(request)
        model = ModelLimits(info.vocab_size, info.context_tokens)
        require_prompt_fits(request.prompt, token_ids, model)
        sampling = msgspec.structs.replace(
            request.sampling,
            max_tokens=resolve_max_tokens(request, len(token_ids), model),
            seed=request.sampling.seed if request.seed_set else secrets.randbits(_SEED_BITS),
            top_k=min(request.sampling.top_k, model.vocab_size),
        )
        submit = Submit(
            request_id=uuid7(),
            prompt_token_ids=token_ids,
            n=request.n,
            sampling=sampling,
            constraint=request.constraint,
            priority=request.priority,
            deadline_s=_engine_deadline_s(call),
            policy=BASE_VERSION,
        )
        return submit, prompt_text

    async def _encode(self, request: GenerationRequest) -> tuple[list[int], str]:
        prompt = request.prompt
        if not isinstance(prompt, TokensPrompt):
            return await self._text.encode_and_render(prompt)
        token_ids = list(prompt.token_ids)
        origin = request.origin
        if origin.rollout or self._log.consent_for(origin).log != "full":
            return token_ids, ""
        return token_ids, await self._text.decode(token_ids, skip_special_tokens=False)

    async def _score_item(self, item: ScoringItem, path: str, model: ModelLimits) -> ScoreItem:
        prompt_ids = await self._text.encode_prompt(item.prompt, f"{path}.prompt")
        require_prompt_fits(item.prompt, prompt_ids, model, f"{path}.prompt")
        completion_ids = await self._text.encode_completion(item)
        room = model.context_tokens - len(prompt_ids)
        require_completion_fits(item.completion, completion_ids, room, model, path)
        return ScoreItem(prompt_ids, completion_ids)

    def _served(self, info: EngineInfo, seed: int, call: Call) -> Served:
        return Served(
            policy_version=BASE_VERSION,
            base_model=self._model_name,
            quantization=info.quantization,
            seed=seed,
            request_id=call.request_id,
        )

    def _observe(self, request: GenerationRequest, submit: Submit) -> None:
        self._metrics.params_n.observe(request.n)
        self._metrics.params_max_tokens.observe(submit.sampling.max_tokens)
        self._metrics.prompt_tokens.observe(len(submit.prompt_token_ids))


def _scope(request: GenerationRequest) -> Scope:
    """Return the log that the answers go to; refuse a purpose that the caller may not have."""
    who = caller()
    if request.origin.rollout:
        who.require(TRAIN)
    return scope_of(who, request.origin.project)


def _engine_deadline_s(call: Call) -> float | None:
    """Return the seconds that the engine has, None without a deadline."""
    if call.deadline_at_s is None:
        return None
    left_s = call.deadline_at_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed before the request reached the engine")
    return left_s - min(_DEADLINE_MARGIN_SHARE * left_s, _MAX_DEADLINE_MARGIN_S)

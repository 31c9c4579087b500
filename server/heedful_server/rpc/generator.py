"""The application layer: validated requests in, generations out.

Owns the steps between a validated request and the engine: admission, the policy it is bound to,
tokenizing, the checks that need the model, the deadline and the submission. It knows nothing of
protobuf or gRPC: servicers and the HTTP façade both call it. Runs on the event loop.
"""

import secrets

import msgspec
from heedful_store import Scope, uuid7

from heedful_server.deployment.door import PolicyDoor
from heedful_server.deployment.observing import Observations
from heedful_server.deployment.residency import Hold
from heedful_server.deployment.served import ServedPolicy
from heedful_server.engine_client.client import EngineClient
from heedful_server.engine_client.stream import EngineStream
from heedful_server.errors import EngineUnavailable
from heedful_server.feedback.access import scope_of
from heedful_server.feedback.completion_log import Answering, CompletionLog
from heedful_server.identity import TRAIN, Caller
from heedful_server.metrics import Metrics
from heedful_server.protocol import EngineInfo, Submit
from heedful_server.readiness import Readiness
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.call import Call, caller, engine_deadline_s
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.model_rules import (
    ModelLimits,
    require_prompt_fits,
    require_token_ids_known,
    resolve_max_tokens,
)
from heedful_server.rpc.parts import Served
from heedful_server.rpc.requests import (
    GenerationRequest,
    TokensPrompt,
)
from heedful_server.rpc.text_pool import TextPool
from heedful_server.security.quota import Quota

# A seed that the server draws is exact as a JSON number too.
_SEED_BITS = 53


class Generator:
    """Starts generations on one engine."""

    def __init__(
        self,
        engine: EngineClient,
        readiness: Readiness,
        text: TextPool,
        admission: Admission,
        metrics: Metrics,
        log: CompletionLog,
        quota: Quota,
        door: PolicyDoor,
        observations: Observations,
        model_name: str,
    ) -> None:
        self._engine = engine
        self._readiness = readiness
        self._text = text
        self._admission = admission
        self._metrics = metrics
        self._log = log
        self._quota = quota
        self._door = door
        self._observations = observations
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
        who = caller()
        scope = _scope(request, who)
        info = self._readiness.require()
        require_token_ids_known(request, info.vocab_size)
        self._admission.admit(request.num_samples, request.priority)
        hold: Hold | None = None
        try:
            hold = await self._enter(who, scope, request)
            submit, prompt_text = await self._submission(request, info, hold.policy)
            await self._door.ready(hold)
            # Nothing is awaited from here on, so the adapter is there when the request arrives.
            submit = msgspec.structs.replace(submit, deadline_s=engine_deadline_s(call))
            stream = self._submit(submit, scope.tenant)
        except BaseException:
            if hold is not None:
                hold.release()
            self._admission.release(request.num_samples, request.priority)
            raise
        self._observe(request, submit)
        served = self._served(hold.policy, info, submit.sampling.seed, call)
        answering = _answering(scope, request, served, submit, prompt_text, info, call)
        return self._begin(answering, stream, hold)

    async def require_model(self, model: str) -> None:
        """Raise NotFound unless the caller's project has such a model."""
        who = caller()
        await self._door.version(who, scope_of(who, ""), model)

    async def _enter(self, who: Caller, scope: Scope, request: GenerationRequest) -> Hold:
        """Claim the policy; where the best are to be kept, there has to be something to judge."""
        if request.best_of:
            (await self._door.enter_reward(scope)).release()
        return await self._door.enter(who, scope, request.model)

    def _submit(self, submit: Submit, tenant: str) -> EngineStream:
        """Hand a request to the engine, charged in full."""
        charge = len(submit.prompt_token_ids) + submit.n * submit.sampling.max_tokens
        self._quota.take(tenant, charge)
        try:
            return self._engine.submit(submit)
        except BaseException:
            self._quota.give_back(tenant, charge)
            raise

    def _begin(self, answering: Answering, stream: EngineStream, hold: Hold) -> Generation:
        def on_end(generation: Generation) -> None:
            self._running.discard(generation)
            hold.release()
            charged = generation.request.num_samples * answering.sampling.max_tokens
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
            record=self._observations.of(answering.scope, hold.policy.version),
            on_end=on_end,
        )
        self._running.add(generation)
        return generation

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

    async def _submission(
        self, request: GenerationRequest, info: EngineInfo, policy: ServedPolicy
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
            n=request.num_samples,
            sampling=sampling,
            constraint=request.constraint,
            priority=request.priority,
            policy=policy.adapter_id,
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

    def _served(self, policy: ServedPolicy, info: EngineInfo, seed: int, call: Call) -> Served:
        return Served(
            policy_version=policy.version,
            policy_hash=policy.content_hash,
            base_model=self._model_name,
            quantization=info.quantization,
            seed=seed,
            request_id=call.request_id,
        )

    def _observe(self, request: GenerationRequest, submit: Submit) -> None:
        self._metrics.params_n.observe(request.n)
        self._metrics.params_max_tokens.observe(submit.sampling.max_tokens)
        self._metrics.prompt_tokens.observe(len(submit.prompt_token_ids))


def _scope(request: GenerationRequest, who: Caller) -> Scope:
    """Return the log that the answers go to; refuse a purpose that the caller may not have."""
    if request.origin.rollout:
        who.require(TRAIN)
    return scope_of(who, request.origin.project)


def _answering(
    scope: Scope,
    request: GenerationRequest,
    served: Served,
    submit: Submit,
    prompt_text: str,
    info: EngineInfo,
    call: Call,
) -> Answering:
    return Answering(
        scope=scope,
        request=request,
        served=served,
        completion_ids=(submit.request_id, *(uuid7() for _ in range(request.num_samples - 1))),
        prompt_ids=submit.prompt_token_ids,
        prompt_text=prompt_text,
        sampling=submit.sampling,
        kernel_path=info.kernel_path,
        received_at_s=call.received_at_s,
    )

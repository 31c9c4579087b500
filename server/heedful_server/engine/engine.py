"""The engine: requests in, deltas out, one step at a time.

Owns the table of generate requests and what happens to them between submission and their last
delta; score requests are in scoring.py, adapters in adapter_slots.py. It knows nothing of sockets,
processes or tensors: the scheduler decides what runs, the runner computes it. Runs in the engine
child's main thread; no method blocks except step(), which takes one forward pass.

Where a launched step computes beside this thread, the next one is launched as soon as the tokens of
the last are known and counted, before their text is made. A sequence whose text then turns out to
have ended has computed a token too many, which nobody gets; whatever ends without a look at the
text (end-of-answer tokens, lengths, grammars) ends before.

One bad request cannot end the engine: whatever a request raises by itself fails that request, and
a forward pass that raises fails the requests that were in it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from heedful_server.engine.adapter_loader import LoadedAdapter
from heedful_server.engine.adapter_slots import AdapterSlots, LoadJob
from heedful_server.engine.constraint import CompiledConstraint
from heedful_server.engine.requests import GenerateRequest, Sample
from heedful_server.engine.runner import Runner, StepResult
from heedful_server.engine.sampler import SampledTokens, SamplerRow
from heedful_server.engine.scheduler import RequestTooLong, Scheduler, StepPlan
from heedful_server.engine.scoring import Scoring, salt
from heedful_server.engine.sequence import EngineRequest, Sequence
from heedful_server.errors import EngineRequestError
from heedful_server.protocol import (
    AdapterLoaded,
    AdapterUnloaded,
    Delta,
    EngineStats,
    Failed,
    FinishReason,
    LoadAdapter,
    Score,
    Scored,
    Submit,
)
from heedful_server.text.detokenizer import StreamDetokenizer
from heedful_server.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

# What a step may fail with; anything else is a bug and ends the engine.
_STEP_ERRORS = (RuntimeError, ValueError, MemoryError)

Report = Delta | Failed | Scored | AdapterLoaded | AdapterUnloaded


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that computes, and how to wait for it."""

    plan: StepPlan
    read: Callable[[], StepResult]
    num_bytes: int


class Engine:
    """Requests, their sequences and the step that advances them."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        max_model_len: int,
        max_adapters: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._eos_token_ids = tokenizer.eos_token_ids
        self._max_model_len = max_model_len
        self._clock = clock
        self._requests: dict[str, GenerateRequest] = {}
        self._reports: list[Report] = []
        self._adapters = AdapterSlots(max_adapters, runner.drop_adapter)
        self._scoring = Scoring(scheduler, self._adapters, self._reports.append)
        # The step that computes already, where steps do that beside this thread.
        self._launched: _Launched | None = None
        self._num_steps = 0
        self.step_bytes = 0
        """Bytes of weights and cache that the last step had to read."""
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished, be it only that its constraint is being compiled."""
        return bool(self._requests or self._scoring.request_ids)

    def submit(self, message: Submit) -> None:
        """Take a generate request; one with a constraint waits for release()."""
        now_s = self._clock()
        try:
            adapter_slot = self._adapters.acquire(message.policy, "policy", "policy")
        except EngineRequestError as error:
            self._reports.append(Failed(message.request_id, error.kind, str(error), error.field))
            return
        samples = [
            Sample(index, StreamDetokenizer(self._tokenizer, message.sampling.stop))
            for index in range(message.n)
        ]
        deadline_at_s = None if message.deadline_s is None else now_s + message.deadline_s
        request = GenerateRequest(message, samples, now_s, deadline_at_s, adapter_slot)
        self._requests[message.request_id] = request
        if message.constraint is None:
            self._queue(request)

    def release(self, request_id: str, constraint: CompiledConstraint) -> None:
        """Queue a request whose constraint is compiled, unless it was cancelled meanwhile."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for sample in request.samples:
            sample.matcher = constraint.matcher()
        self._queue(request)

    def refuse(self, request_id: str, error: EngineRequestError) -> None:
        """Fail a request that is not queued yet, unless it was cancelled meanwhile."""
        if self._forget(request_id) is not None:
            self._reports.append(Failed(request_id, error.kind, str(error), error.field))

    def _queue(self, request: GenerateRequest) -> None:
        message = request.submit
        try:
            self._scheduler.add(
                EngineRequest(
                    request_id=message.request_id,
                    prompt_token_ids=message.prompt_token_ids,
                    n=message.n,
                    max_tokens=message.sampling.max_tokens,
                    priority=message.priority,
                    cache_salt=salt(message.cache_salt, message.policy),
                    deadline_at_s=request.deadline_at_s,
                    adapter_slot=request.adapter_slot,
                )
            )
        except RequestTooLong as error:
            self._forget(message.request_id)
            self._reports.append(Failed(message.request_id, "resource", str(error), "prompt"))

    def _forget(self, request_id: str) -> GenerateRequest | None:
        """Take a request off the table, whose adapter is then free to go."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._adapters.release(request.submit.policy)
        return request

    def score(self, message: Score) -> None:
        """Take a score request."""
        deadline_at_s = None if message.deadline_s is None else self._clock() + message.deadline_s
        self._scoring.add(message, deadline_at_s)

    def load_adapter(self, message: LoadAdapter) -> LoadJob | None:
        """Take a request to load an adapter; return what has to be read for finish_load()."""
        return self._adapters.load(message)

    def finish_load(self, adapter_id: str, loaded: LoadedAdapter) -> None:
        """Let an adapter serve from the next step on, or fail whoever waits for it."""
        self._adapters.finish(adapter_id, loaded.outcome, loaded.load_s)

    def unload_adapter(self, adapter_id: str) -> None:
        """Let an adapter go as soon as no request has it."""
        self._adapters.unload(adapter_id)

    def cancel(self, request_id: str, reason: FinishReason) -> None:
        """End a request now; what it sampled so far has been or will be reported."""
        if request_id in self._scoring:
            self._scoring.drop(request_id)
            return
        self._scheduler.cancel(request_id)
        request = self._forget(request_id)
        if request is None:
            return
        for sample in request.samples:
            if not sample.finished:
                self._reports.append(self._last_delta(request, sample, reason))

    def take_reports(self) -> list[Report]:
        """Return what has happened since the last call."""
        reports = [*self._reports, *self._adapters.take_reports()]
        self._reports.clear()
        return reports

    def stats(self, step_s: float, num_tokens: int) -> EngineStats:
        """Return where the engine stands after a step of the given cost."""
        scheduler, adapters = self._scheduler, self._adapters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=scheduler.num_free_blocks,
            num_blocks=scheduler.num_blocks,
            num_cached_blocks=scheduler.num_cached_blocks,
            preemptions=scheduler.preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._num_steps,
            step_s=step_s,
            step_tokens=num_tokens,
            step_bytes=self.step_bytes if num_tokens else 0,
            kernel_fallbacks=dict(self._runner.decoder.fallbacks),
            num_adapters=adapters.num_taken,
            num_adapter_slots=adapters.num_slots,
            adapter_bytes=adapters.num_bytes,
            adapter_requests=adapters.requests,
            adapter_loads=adapters.loads,
            adapter_load_s=adapters.load_s,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when an idle engine still holds KV blocks, requests or adapters."""
        assert not self._requests, f"idle engine holds requests {sorted(self._requests)}"
        assert not self._scoring.request_ids, f"idle engine holds {self._scoring.request_ids}"
        assert not any(self._adapters.requests.values()), self._adapters.requests
        self._adapters.check_integrity()
        self._scheduler.check_integrity()

    def step(self) -> int:
        """Run one step and return how many tokens it computed."""
        self._expire()
        launched, self._launched = self._launched or self._launch(), None
        self.step_bytes = 0
        if launched is None:
            return 0
        plan = launched.plan
        try:
            result = launched.read()
        except _STEP_ERRORS as error:
            self._fail_plan(plan, error)
            return 0
        self._commit(plan, result)
        taken = self._take_tokens(plan, result.sampled)
        # What scores holds on to adapters that a step in flight may not lose.
        if self._runner.overlaps and not self._scoring.request_ids:
            self._launched = self._launch()
        if result.sampled is not None:
            for row in taken:
                self._report_token(plan.samples[row].sequence, result.sampled, row)
        self.step_bytes = launched.num_bytes
        return sum(chunk.num_tokens for chunk in plan.chunks)

    def _launch(self) -> _Launched | None:
        """Plan the next step and begin to compute it; None when there is nothing to do."""
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return None
        self._num_steps += 1
        num_bytes = self._runner.bytes_read(plan)
        self._note_scheduled(plan)
        try:
            rows = [self._sampler_row(item.sequence) for item in plan.samples]
            return _Launched(plan, self._runner.launch(plan, rows), num_bytes)
        except _STEP_ERRORS as error:
            self._fail_plan(plan, error)
            return None

    def _expire(self) -> None:
        now_s = self._clock()
        for request_id in self._scheduler.expired(now_s):
            score_id = self._scoring.owner(request_id)
            if score_id is not None:
                self._scoring.fail(score_id, "deadline", "the deadline passed", "")
            else:
                self.cancel(request_id, "deadline")

    def _note_scheduled(self, plan: StepPlan) -> None:
        now_s = self._clock()
        for chunk in plan.chunks:
            request = self._requests.get(chunk.sequence.request_id)
            if request is None or request.first_scheduled_at_s:
                continue
            request.first_scheduled_at_s = now_s
            request.cached_prompt_tokens = chunk.sequence.num_cached_prompt_tokens or 0
            self._prompt_tokens += len(request.submit.prompt_token_ids)

    def _sampler_row(self, sequence: Sequence) -> SamplerRow:
        request = self._requests[sequence.request_id]
        sample = request.samples[sequence.index]
        sample.sequence = sequence
        return SamplerRow(
            params=request.submit.sampling,
            sample_idx=sequence.index,
            position=len(sample.token_ids),
            prompt_token_ids=request.submit.prompt_token_ids,
            completion_token_ids=sample.token_ids,
            token_mask=None if sample.matcher is None else sample.matcher.bitmask(),
            eos_token_ids=self._eos_token_ids,
        )

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        sampled = result.sampled
        tokens = [] if sampled is None else sampled.token_ids
        if sampled is not None:
            # Before the commit, so that keys and values with a NaN never reach the prefix cache.
            self._fail_unsampled(plan, sampled)
        self._scheduler.commit(
            plan,
            {item.sequence: token for item, token in zip(plan.samples, tokens, strict=True)},
        )
        for sequence, logprobs in result.scored:
            self._scoring.take_logprobs(sequence, logprobs)
        for sequence, rewards in result.rewards:
            self._scoring.take_rewards(sequence, rewards)

    def _take_tokens(self, plan: StepPlan, sampled: SampledTokens | None) -> list[int]:
        """Count the tokens of a committed step; the rows of those that somebody waits for."""
        if sampled is None:
            return []
        now_s = self._clock()
        taken = []
        for row, item in enumerate(plan.samples):
            sequence, token_id = item.sequence, sampled.token_ids[row]
            request = self._requests.get(sequence.request_id)
            if request is None or request.samples[sequence.index].finished:
                # It or a sibling could not be sampled, or it ended while the step ran.
                continue
            sample = request.samples[sequence.index]
            sample.token_ids.append(token_id)
            sample.first_token_at_s = sample.first_token_at_s or now_s
            self._generation_tokens += 1
            if sample.matcher is not None:
                sample.matcher.accept(token_id)
            if self._ends(request, sample, token_id):
                self._scheduler.finish(sequence)
            taken.append(row)
        return taken

    def _ends(self, request: GenerateRequest, sample: Sample, token_id: int) -> bool:
        """Whether a completion ends with a token whatever its text is."""
        sampling = request.submit.sampling
        ends_answer = token_id in self._eos_token_ids and not sampling.ignore_eos
        if ends_answer or token_id in sampling.stop_token_ids:
            return True
        return self._is_full(request, sample) or (
            sample.matcher is not None and sample.matcher.terminated
        )

    def _is_full(self, request: GenerateRequest, sample: Sample) -> bool:
        num_tokens = len(sample.token_ids)
        length = len(request.submit.prompt_token_ids) + num_tokens
        return num_tokens >= request.submit.sampling.max_tokens or length >= self._max_model_len

    def _report_token(self, sequence: Sequence, sampled: SampledTokens, row: int) -> None:
        request = self._requests.get(sequence.request_id)
        if request is None:
            # The step after it could not be launched.
            return
        sample = request.samples[sequence.index]
        token_id = sampled.token_ids[row]
        text, reason, stop = self._advance(request, sample, token_id)
        finish = None
        if reason is not None:
            text += "" if stop else sample.detokenizer.finish()
            finish = request.finish(sample, reason, stop, self._clock())
            self._scheduler.finish(sequence)
        self._reports.append(
            Delta(
                request_id=sequence.request_id,
                index=sequence.index,
                text=text,
                token_ids=[token_id],
                logprobs=[sampled.logprobs[row]],
                sampling_logprobs=[sampled.sampling_logprobs[row]],
                kept_mass=[sampled.kept_mass[row]],
                top=[sampled.top[row]] if request.submit.sampling.top_logprobs else [],
                finish=finish,
            )
        )
        if request.finished:
            self._forget(sequence.request_id)

    def _advance(
        self, request: GenerateRequest, sample: Sample, token_id: int
    ) -> tuple[str, FinishReason | None, str]:
        """Return the text that a token adds, why it ends the completion, and the stop string."""
        sampling = request.submit.sampling
        if token_id in sampling.stop_token_ids:
            return "", "stop", ""
        if token_id in self._eos_token_ids and not sampling.ignore_eos:
            return "", "stop", ""
        num_tokens = len(sample.token_ids)
        delta = sample.detokenizer.push(token_id, may_stop=num_tokens >= sampling.min_tokens)
        if delta.stop is not None:
            return delta.text, "stop", delta.stop
        if sample.matcher is not None and sample.matcher.terminated:
            return delta.text, "stop", ""
        if self._is_full(request, sample):
            return delta.text, "length", ""
        return delta.text, None, ""

    def _last_delta(self, request: GenerateRequest, sample: Sample, reason: FinishReason) -> Delta:
        return Delta(
            request_id=request.submit.request_id,
            index=sample.index,
            text=sample.detokenizer.finish(),
            token_ids=[],
            logprobs=[],
            sampling_logprobs=[],
            kept_mass=[],
            finish=request.finish(sample, reason, "", self._clock()),
        )

    def _fail_unsampled(self, plan: StepPlan, sampled: SampledTokens) -> None:
        for item, error in zip(plan.samples, sampled.errors, strict=True):
            request = self._requests.get(item.sequence.request_id)
            finished = request is None or request.samples[item.sequence.index].finished
            if error is not None and request is not None and not finished:
                self._fail_sample(request, request.samples[item.sequence.index], error)

    def _fail_sample(self, request: GenerateRequest, sample: Sample, error: str) -> None:
        request_id, constraint = request.submit.request_id, request.submit.constraint
        failure = None if sample.matcher is None else sample.matcher.failure
        if constraint is None or failure is None:
            self._fail_request(request_id, error)
            return
        self._scheduler.cancel(request_id)
        self._forget(request_id)
        self._reports.append(
            Failed(request_id, "invalid", failure, f"constraint.{constraint.kind}")
        )

    def _fail_request(self, request_id: str, message: str) -> None:
        self._scheduler.cancel(request_id)
        if self._forget(request_id) is not None:
            self._reports.append(Failed(request_id, "internal", message, ""))

    def _fail_plan(self, plan: StepPlan, error: Exception) -> None:
        log.error("step failed", exc_info=error, error=type(error).__name__)
        message = f"the step failed: {type(error).__name__}"
        for request_id in {chunk.sequence.request_id for chunk in plan.chunks}:
            score_id = self._scoring.owner(request_id)
            if score_id is not None:
                self._scoring.fail(score_id, "internal", message, "")
            else:
                self._fail_request(request_id, message)

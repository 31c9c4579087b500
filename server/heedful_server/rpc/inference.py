"""InferenceService: a thin layer between messages and the application layer.

Owns no rules and no state: messages are validated by validate.py, answered by generator.py,
scorer.py and text_pool.py and turned back by convert.py; the interceptor turns exceptions into
statuses. Runs on the event loop.
"""
# ruff: noqa: N802 - the contract names the methods

import functools
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceServicer

from heedful_server.feedback.access import scope_of
from heedful_server.feedback.reading import FeedbackReader
from heedful_server.rpc import convert, feedback_convert, validate
from heedful_server.rpc.call import caller, current_call
from heedful_server.rpc.feedback_rules import require_id
from heedful_server.rpc.generator import Generator
from heedful_server.rpc.model_rules import require_token_ids
from heedful_server.rpc.rules import require
from heedful_server.rpc.scorer import Scorer
from heedful_server.rpc.text_pool import TextPool
from heedful_server.setting_groups import LimitSettings

Context = grpc.aio.ServicerContext[Any, Any]


_STREAMS_AT_FULL_RATE = 16


class InferenceService(InferenceServiceServicer):
    """Serves the policies of one base model."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        text: TextPool,
        reader: FeedbackReader,
        limits: LimitSettings,
        stream_interval_s: float,
    ) -> None:
        self._generator = generator
        self._scorer = scorer
        self._text = text
        self._reader = reader
        self._limits = limits
        self._stream_interval_s = stream_interval_s

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Generate n completions of one prompt and return them together."""
        wanted = validate.generation_request(request, self._limits)
        with await self._generator.start(wanted, current_call.get()) as generation:
            choose = functools.partial(self._scorer.best, generation) if wanted.best_of else None
            parts = await generation.collect(choose)
            return convert.generate_response(generation, parts, self._text.token_text)

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Generate n completions of one prompt and stream them."""
        wanted = validate.generation_request(request.request, self._limits)
        reason = "cannot be streamed: which ones are best is known at the end; use Generate"
        require("best_of", not wanted.best_of, reason)
        with await self._generator.start(wanted, current_call.get()) as generation:
            yield convert.stream_head(generation)
            flush_at_s = 0.0
            while not generation.finished:
                parts = await generation.next_parts(flush_at_s)
                flush_at_s = time.monotonic() + self._interval_s()
                for part in parts:
                    yield convert.stream_delta(generation, part, self._text.token_text)

    def _interval_s(self) -> float:
        # A message costs the processor about as much as a token: many streams share a budget.
        crowd = self._generator.num_running / _STREAMS_AT_FULL_RATE
        return self._stream_interval_s * max(1.0, crowd)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Return the log-probs of given completions, and their rewards."""
        wanted = validate.scoring_request(request, self._limits)
        return convert.score_response(await self._scorer.score(wanted, current_call.get()))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Turn text or a conversation into token ids."""
        wanted = validate.tokenize_input(request, self._limits)
        await self._generator.require_model(request.model)
        context_tokens = self._generator.context_tokens
        return convert.tokenize_response(await self._text.tokenize(wanted), context_tokens)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        token_ids = validate.detokenize_ids(request, self._limits)
        await self._generator.require_model(request.model)
        require_token_ids("token_ids", token_ids, self._text.vocab_size)
        text = await self._text.decode(token_ids, request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def GetCompletion(
        self, request: pb.GetCompletionRequest, context: Context
    ) -> pb.GetCompletionResponse:
        """Return a logged completion to those who may read it."""
        who = caller()
        require_id("completion_id", request.completion_id)
        answer = await self._reader.completion(
            who, scope_of(who, request.project), request.completion_id, request.completion_token
        )
        return pb.GetCompletionResponse(completion=feedback_convert.logged_completion(answer))

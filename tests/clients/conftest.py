"""A small real server for the client's tests: grpc.aio on loopback, in a thread of its own.

The servicer "generates" the bytes of the last prompt text back, one token a byte, so every
expected value can be worked out by hand; `Script` says how a test wants the server to behave. It is
the other side of the wire, not a stand-in for any part of the client.
"""

import asyncio
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from heedful_proto.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

CONTEXT_TOKENS = 2048
MAIN = "from heedful.cli import main; main()"
# Makes standard input the controlling terminal, so that ^C becomes SIGINT.
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
HEALTH_NAMES = ("Inference", "Feedback", "Model")


@dataclass
class Refusal:
    """A status with rich details."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    retry_after_s: float | None = None
    reason: str = ""


@dataclass
class Script:
    """How the server behaves, and what it saw."""

    refusals: list[Refusal] = field(default_factory=list)
    refuse_after_messages: tuple[int, Refusal] | None = None
    delay_s: float = 0.0
    tokens_per_message: int = 2
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    scores: list[inference_pb2.ScoreRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    attempts: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    unique_ids: bool = False
    rateable: bool = True
    logged: dict[str, inference_pb2.LoggedCompletion] = field(default_factory=dict)


def _status(refusal: Refusal) -> grpc.Status:
    details: list[any_pb2.Any] = []
    messages: list[object] = []
    if refusal.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=refusal.field, description=refusal.message
        )
        messages.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if refusal.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(refusal.retry_after_s * 1000))
        messages.append(retry)
    if refusal.reason:
        messages.append(error_details_pb2.ErrorInfo(reason=refusal.reason, domain="heedful"))
    messages.append(error_details_pb2.RequestInfo(request_id="req-1"))
    for message in messages:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)
    code = getattr(code_pb2, refusal.code.name)
    return rpc_status.to_status(
        status_pb2.Status(code=code, message=refusal.message, details=details)
    )


async def _refuse(context: grpc.aio.ServicerContext, refusal: Refusal) -> None:
    status = _status(refusal)
    await context.abort(status.code, status.details, tuple(status.trailing_metadata))


def _prompt_text(prompt: inference_pb2.Prompt) -> str:
    match prompt.WhichOneof("form"):
        case "text":
            return prompt.text
        case "chat":
            return prompt.chat.messages[-1].content
        case _:
            return bytes(prompt.token_ids.ids).decode("latin-1")


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Echoes: completion i of "abc" is "abc" repeated up to max_tokens, shifted by i."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        self.script.attempts += 1
        self.script.metadata.append(
            {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        )
        if self.script.refusals:
            await _refuse(context, self.script.refusals.pop(0))

    def _served_by(self, request: inference_pb2.GenerateRequest) -> inference_pb2.ServedBy:
        seed = request.sampling.seed if request.sampling.HasField("seed") else 77
        return inference_pb2.ServedBy(
            policy_version="base",
            base_model="Echo-1",
            quantization="q4_1",
            seed=seed,
            request_id="req-1",
        )

    def _completion(
        self, request: inference_pb2.GenerateRequest, index: int
    ) -> inference_pb2.Completion:
        text = _prompt_text(request.prompt)
        shifted = text[index:] + text[:index]
        sampling = request.sampling
        if sampling.ignore_eos:
            shifted = (shifted * sampling.max_tokens)[: sampling.max_tokens]
        cut = sampling.HasField("max_tokens") and sampling.max_tokens <= len(shifted)
        shifted = shifted[: sampling.max_tokens] if cut else shifted
        token_ids = list(shifted.encode("latin-1"))
        number = len(self.script.logged) if self.script.unique_ids else index
        completion = inference_pb2.Completion(
            index=index,
            completion_id=f"id-{number}",
            completion_token=f"token-{number}",
            rateable=self.script.rateable,
            text=shifted,
            token_ids=token_ids,
            finish_reason=inference_pb2.FINISH_REASON_LENGTH
            if cut
            else inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(
                prompt_tokens=len(text),
                cached_prompt_tokens=1,
                completion_tokens=len(token_ids),
            ),
        )
        if sampling.logprobs:
            for token_id in token_ids:
                entry = completion.logprobs.add(
                    token_id=token_id,
                    logprob=-0.5,
                    sampling_logprob=-0.25,
                    kept_mass=0.75,
                    token=chr(token_id),
                )
                for rank in range(sampling.top_logprobs):
                    entry.top.add(token_id=rank, logprob=-1.0 - rank, token=chr(97 + rank))
        self._log(request, completion)
        return completion

    def _log(
        self, request: inference_pb2.GenerateRequest, completion: inference_pb2.Completion
    ) -> None:
        logged = inference_pb2.LoggedCompletion(
            completion=completion,
            served_by=self._served_by(request),
            prompt_text=_prompt_text(request.prompt),
            prompt_token_ids=list(_prompt_text(request.prompt).encode()),
            sampling=request.sampling,
            consent=request.consent,
            end_user=request.end_user,
            conversation_id=request.conversation_id,
            tags=request.tags,
        )
        logged.create_time.FromSeconds(86_400)
        logged.duration.FromMilliseconds(1500)
        self.script.logged[completion.completion_id] = logged

    async def Generate(self, request, context):  # noqa: N802
        await self._admit(context)
        self.script.requests.append(request)
        try:
            await asyncio.sleep(self.script.delay_s)
        except asyncio.CancelledError:
            self.script.cancelled.set()
            raise
        completions = [self._completion(request, i) for i in range(request.n or 1)]
        return inference_pb2.GenerateResponse(
            served_by=self._served_by(request),
            completions=completions,
            usage=inference_pb2.Usage(
                prompt_tokens=completions[0].usage.prompt_tokens,
                cached_prompt_tokens=1,
                completion_tokens=sum(item.usage.completion_tokens for item in completions),
            ),
        )

    async def GenerateStream(self, request, context):  # noqa: N802
        await self._admit(context)
        self.script.requests.append(request.request)
        self.script.in_flight += 1
        self.script.max_in_flight = max(self.script.max_in_flight, self.script.in_flight)
        try:
            num_messages = 0
            async for message in self._messages(request.request):
                if self.script.refuse_after_messages is not None:
                    limit, refusal = self.script.refuse_after_messages
                    if num_messages >= limit:
                        await _refuse(context, refusal)
                num_messages += 1
                yield message
        except asyncio.CancelledError:
            self.script.cancelled.set()
            raise
        finally:
            self.script.in_flight -= 1

    async def _messages(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        completions = [self._completion(request, i) for i in range(request.n or 1)]
        head = inference_pb2.StreamHead(served_by=self._served_by(request))
        for item in completions:
            head.completions.add(
                index=item.index,
                completion_id=item.completion_id,
                completion_token=item.completion_token,
                rateable=item.rateable,
            )
        yield inference_pb2.GenerateStreamResponse(head=head)
        step = self.script.tokens_per_message
        starts = range(0, max(len(item.token_ids) for item in completions), step)
        for start in starts:
            for item in completions:
                await asyncio.sleep(self.script.delay_s)
                last = start + step >= len(item.token_ids)
                delta = inference_pb2.CompletionDelta(
                    index=item.index,
                    text=item.text[start : start + step],
                    token_ids=item.token_ids[start : start + step],
                    logprobs=item.logprobs[start : start + step],
                )
                if last:
                    delta.finish_reason = item.finish_reason
                    delta.usage.CopyFrom(item.usage)
                yield inference_pb2.GenerateStreamResponse(delta=delta)

    async def Score(self, request, context):  # noqa: N802
        await self._admit(context)
        self.script.scores.append(request)
        response = inference_pb2.ScoreResponse(policy_version="base")
        for item in request.items:
            ids = list(item.text.encode()) if item.HasField("text") else list(item.token_ids.ids)
            score = response.scores.add(token_ids=ids, logprobs=[-0.5] * len(ids))
            score.total_logprob = -0.5 * len(ids)
            if request.reward:
                score.reward = 1.5
        return response

    async def Tokenize(self, request, context):  # noqa: N802
        await self._admit(context)
        chat = request.WhichOneof("input") == "chat"
        rendered = "|".join(f"{m.role}:{m.content}" for m in request.chat.messages) if chat else ""
        text = rendered if chat else request.text
        return inference_pb2.TokenizeResponse(
            token_ids=list(text.encode()),
            tokens=list(text),
            rendered=rendered,
            context_tokens=CONTEXT_TOKENS,
        )

    async def Detokenize(self, request, context):  # noqa: N802
        await self._admit(context)
        return inference_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def GetCompletion(self, request, context):  # noqa: N802
        await self._admit(context)
        logged = self.script.logged.get(request.completion_id)
        if logged is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown completion")
        if request.completion_token not in ("", logged.completion.completion_token):
            await _refuse(
                context,
                Refusal(grpc.StatusCode.INVALID_ARGUMENT, "is forged", field="completion_token"),
            )
        return inference_pb2.GetCompletionResponse(completion=logged)


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """One base model; everything else is unimplemented, as the base class says it."""

    async def ListModels(self, request, context):  # noqa: N802
        response = models_pb2.ListModelsResponse()
        model = response.models.add(
            version="base",
            base_model="Echo-1",
            state=models_pb2.POLICY_STATE_CHAMPION,
            loaded=True,
            quantization="q4_1",
            context_tokens=CONTEXT_TOKENS,
        )
        model.create_time.FromSeconds(86_400)
        response.aliases.add(name="champion", version="base")
        return response


class EchoServer:
    """The server, its thread, and its script; it can be stopped and started on the same port."""

    def __init__(self) -> None:
        self.script = Script()
        self.model_service: models_pb2_grpc.ModelServiceServicer = ModelServicer()
        self.health = health.aio.HealthServicer()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.target = f"127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None
        self.more_services: list[Callable[[grpc.aio.Server], None]] = []

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=20)

    def start(self) -> None:
        self._run(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            Servicer(self.script), self._server
        )
        models_pb2_grpc.add_ModelServiceServicer_to_server(self.model_service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        for add_service in self.more_services:
            add_service(self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()
        for name in HEALTH_NAMES:
            await self._set_status(name, health_pb2.HealthCheckResponse.SERVING)

    async def _set_status(self, name: str, status: int) -> None:
        await self.health.set(f"heedful.v1.{name}Service", status)

    def set_ready(self, ready: bool, service: str = "Inference") -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        self._run(self._set_status(service, status))

    def stop(self) -> None:
        if self._server is not None:
            self._run(self._server.stop(0))
            self._server = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Terminal:
    """A command in a pseudo-terminal: type into it and wait for what it shows."""

    def __init__(self, target: str, *arguments: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self._shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL + MAIN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "HEEDFUL_TARGET": target, "TERM": "dumb", **environment},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout_s: float = 15.0) -> str:
        """Returns what was shown up to and including `text`."""
        end_s = time.monotonic() + timeout_s
        while text not in self._shown:
            left_s = end_s - time.monotonic()
            readable, _, _ = select.select([self._master], [], [], max(left_s, 0))
            if not readable:
                raise AssertionError(f"{text!r} did not come; shown: {self._shown!r}")
            self._shown += os.read(self._master, 4096).decode()
        before, _, self._shown = self._shown.partition(text)
        return before + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def open_terminal(server):
    """Starts commands in pseudo-terminals against the small server."""
    opened: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(server.target, *arguments, **environment))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    echo = EchoServer()
    echo.start()
    yield echo
    echo.close()


@pytest.fixture
def script(server: EchoServer) -> Script:
    return server.script


@pytest.fixture
def refusal() -> type[Refusal]:
    return Refusal


@pytest.fixture
def refuse():
    return _refuse


@pytest.fixture
def eventually():
    """Waits until a condition holds, at most five seconds."""

    def wait(condition) -> bool:
        end_s = time.monotonic() + 5
        while not condition():
            if time.monotonic() > end_s:
                return False
            time.sleep(0.01)
        return True

    return wait

"""The asynchronous client: the one core that everything else runs on.

Owns the methods and their defaults, those about feedback in `feedback_calls.py` and those about
versions and runs in `model_calls.py`; `transport.py` owns connection, deadlines and retries,
`requests.py` and `replies.py` own conversion. Lives on the event loop that first uses it; safe for
any number of concurrent tasks there. Imports neither server nor torch.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, Unpack

from grpc_health.v1 import health_pb2

from heedful import replies, requests
from heedful.errors import (
    DeadlineExceeded,
    NotConnected,
    NotFound,
    Unavailable,
)
from heedful.model_calls import ModelCalls
from heedful.stream import AsyncGenerationStream
from heedful.transport import TLS, Deadline, Transport
from heedful.types import (
    GenerateOptions,
    Generation,
    Health,
    Message,
    Prompt,
    Score,
    ServingStatus,
    Text,
    Tokenization,
)

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 120.0
INFERENCE_SERVICE = "heedful.v1.InferenceService"
FEEDBACK_SERVICE = "heedful.v1.FeedbackService"
MODEL_SERVICE = "heedful.v1.ModelService"
_POLL_S = 0.2
_POLL_TIMEOUT_S = 2.0
_SERVING = {
    health_pb2.HealthCheckResponse.SERVING: ServingStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: ServingStatus.NOT_SERVING,
}


class AsyncClient(ModelCalls):
    """A connection to one heedful server.

    Args:
        target: host and port of the server's gRPC port.
        api_key: sent with every call, where the server asks for keys.
        tls: how to encrypt; None for plain text.
        project: the project whose policy answers.
        timeout_s: seconds that a call may take with its retries, unless the call says otherwise.
        max_attempts: how often a call is tried where trying again is safe; 1 for no retries.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        tls: TLS | None = None,
        project: str = "default",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_attempts: int = 4,
    ) -> None:
        transport = Transport(
            target, tls=tls, api_key=api_key, timeout_s=timeout_s, max_attempts=max_attempts
        )
        super().__init__(transport, project)
        self.target = target

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Returns whole completions of `prompt`; a str is one user message, `Text` is plain text.

        Raises:
            HeedfulError: see `heedful.errors`.
            TypeError: an option is unknown or has the wrong type.
        """
        request = requests.generate_request(prompt, options, self.project)
        deadline = self._transport.deadline(options.get("timeout_s"))
        response = await self._transport.unary(
            self._transport.stubs.inference.Generate,
            request,
            deadline=deadline,
            repeatable=options.get("purpose") == "rollout",
        )
        return replies.generation_from_wire(response)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerationStream:
        """Returns completions of `prompt` as they are sampled; the call starts with the first read.

        Raises:
            InvalidRequest: a value cannot be put on the wire; other errors come while reading.
            TypeError: an option is unknown or has the wrong type.
        """
        request = requests.generate_request(prompt, options, self.project)
        deadline = self._transport.deadline(options.get("timeout_s"))
        return AsyncGenerationStream(self._transport, request, deadline)

    async def score(
        self,
        items: Iterable[tuple[Prompt, str | Sequence[int]]],
        *,
        model: str | None = None,
        reward: bool = False,
        priority: Literal["interactive", "background"] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Score, ...]:
        """Returns the score of each (prompt, completion); a str completion is closed by EOS.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = requests.score_request(
            items, model=model, reward=reward, priority=priority, project=self.project
        )
        deadline = self._transport.deadline(timeout_s)
        response = await self._transport.unary(
            self._transport.stubs.inference.Score, request, deadline=deadline, repeatable=True
        )
        return replies.scores_from_wire(response)

    async def tokenize(
        self,
        text: str | Text | Sequence[Message | Mapping[str, str]],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> Tokenization:
        """Returns the token ids of plain text (str or `Text`) or of a rendered conversation.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = requests.tokenize_request(text, model)
        deadline = self._transport.deadline(timeout_s)
        response = await self._transport.unary(
            self._transport.stubs.inference.Tokenize, request, deadline=deadline, repeatable=True
        )
        return replies.tokenization_from_wire(response)

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = requests.detokenize_request(token_ids, model, skip_special_tokens)
        deadline = self._transport.deadline(timeout_s)
        response = await self._transport.unary(
            self._transport.stubs.inference.Detokenize, request, deadline=deadline, repeatable=True
        )
        return response.text

    async def health(self, *, timeout_s: float | None = 5.0) -> Health:
        """Returns the status of every service, without waiting for any to change.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        deadline = self._transport.deadline(timeout_s)
        inference, feedback, models = await asyncio.gather(
            self._service_status(INFERENCE_SERVICE, deadline),
            self._service_status(FEEDBACK_SERVICE, deadline),
            self._service_status(MODEL_SERVICE, deadline),
        )
        return Health(inference, feedback, models)

    async def wait_ready(
        self,
        timeout_s: float = 60.0,
        *,
        connect_timeout_s: float | None = None,
        service: Literal["inference", "feedback"] = "inference",
    ) -> None:
        """Waits until completions are served, or feedback is taken.

        Args:
            timeout_s: seconds to wait for a server that starts or loads; `math.inf` for no limit.
            connect_timeout_s: seconds to wait for a server to answer at all; default `timeout_s`.
            service: what to wait for.

        Raises:
            NotConnected: no server answered in time.
            Unavailable: a server answered, but was not ready in time.
        """
        deadline = Deadline(timeout_s)
        patience = Deadline(timeout_s if connect_timeout_s is None else connect_timeout_s)
        name = FEEDBACK_SERVICE if service == "feedback" else INFERENCE_SERVICE
        answered = False
        while True:
            try:
                status = await self._service_status(name, Deadline(_POLL_TIMEOUT_S))
                if status is ServingStatus.SERVING:
                    return
                answered = True
            except (NotConnected, DeadlineExceeded):
                if not answered and not patience.allows(_POLL_S):
                    raise NotConnected(f"no server answers at {self.target}") from None
            except Unavailable:
                answered = True
            if not deadline.allows(_POLL_S):
                raise Unavailable(f"the server at {self.target} is not ready yet")
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Closes the connection; calls in flight end as cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _service_status(self, service: str, deadline: Deadline) -> ServingStatus:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._transport.unary(
                self._transport.stubs.health.Check, request, deadline=deadline, repeatable=True
            )
        except NotFound:
            return ServingStatus.UNKNOWN
        return _SERVING.get(response.status, ServingStatus.UNKNOWN)

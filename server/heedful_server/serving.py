"""Puts the server together and takes it apart again.

Owns the wiring of engine, services and ports, and the order of starting and draining. It knows
nothing of the command line, of signals or of how a model is obtained. Runs on the event loop.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from heedful_proto.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from starlette.requests import Request

from heedful_server.config import ServerConfig
from heedful_server.deployment.parts import DeploymentParts, make_deployment
from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import StartupError
from heedful_server.feedback.comparing import Comparing
from heedful_server.feedback.desk import FeedbackDesk
from heedful_server.feedback.importing import Importer
from heedful_server.feedback.opening import open_feedback
from heedful_server.feedback.reading import FeedbackReader
from heedful_server.feedback.uncertainty import Uncertainty
from heedful_server.http.app import HttpServer, make_app
from heedful_server.identity import ADMIN
from heedful_server.metrics import Metrics
from heedful_server.readiness import Readiness
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.describing import Describer
from heedful_server.rpc.feedback import FeedbackService
from heedful_server.rpc.generator import Generator
from heedful_server.rpc.health import HealthService
from heedful_server.rpc.inference import InferenceService
from heedful_server.rpc.interceptors import CallInterceptor
from heedful_server.rpc.models import ModelService
from heedful_server.rpc.scorer import Scorer
from heedful_server.rpc.text_pool import TextPool
from heedful_server.security.certificates import Certificates
from heedful_server.security.keyring import Keyring
from heedful_server.security.quota import Quotas
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
FEEDBACK = feedback_pb2.DESCRIPTOR.services_by_name["FeedbackService"].full_name
MODELS = models_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
HEALTH = "grpc.health.v1.Health"

_HEALTH_INTERVAL_S = 0.5
# How long callers have to take the partial answers that a shutdown leaves them with.
_CUT_SHORT_S = 1.0
_KEEPALIVE_MS = 60_000
_MIN_PING_INTERVAL_MS = 10_000


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model's name, its directory and what turns text into its tokens."""

    name: str
    path: Path
    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def base_id(self) -> str:
        """Identity of model and tokenizer, as logged with every answer."""
        return f"{self.name}@{self.tokenizer.identity[:16]}"


def load_text(name: str, path: Path) -> ServedModel:
    """Load what turns text into tokens; raises ModelUnusable where the files do not allow it."""
    return ServedModel(name, path, Tokenizer.load(path), ChatTemplate.load(path))


class Server:
    """The engine, the gRPC port and the HTTP port of one process."""

    def __init__(
        self,
        config: ServerConfig,
        model: ServedModel,
        make_engine: Callable[..., EngineClient] = EngineClient,
        quota_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the store and wire everything; nothing is served before start.

        Raises:
            StartupError: the store cannot be opened, or the certificate cannot be used.
        """
        self._config = config
        self.certificates = Certificates(config.tls) if config.tls.cert_file else None
        self.metrics = Metrics()
        self.engine = make_engine(
            config.engine_config(model.path),
            on_state=self._on_engine_state,
            on_stats=self.metrics.engine.take,
            hang_timeout_s=config.engine.hang_timeout_s,
        )
        self.readiness = Readiness(self.engine, config.engine.heartbeat_timeout_s)
        self._text = TextPool(model.tokenizer, model.template)
        self.feedback = open_feedback(
            config, model.base_id, model.template.identity, self.metrics.feedback
        )
        self._quotas = Quotas(config.quota, quota_clock)
        self.deployment = self._make_deployment(model)
        self._admission = Admission(
            config.engine.max_sequences + config.engine.max_queue,
            on_change=self.metrics.sequences_in_flight.set,
        )
        self._generator = self._make_generator(model)
        self._scorer = self._make_scorer()
        self._health = HealthService()
        self.keyring = Keyring(self.feedback.store, config.key_rule)
        self.comparing = self._make_comparing()
        self.models = self._make_models(model)
        self._interceptor = CallInterceptor(
            self.metrics, self.keyring, self._quotas.requests, config.grpc.write_timeout_s
        )
        self._grpc = self._make_grpc()
        self._http: HttpServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._hurry = asyncio.Event()
        self.grpc_address = ""
        self.http_address = ""

    async def start(self) -> None:
        """Open the ports and start the engine; returns before the engine is ready.

        Raises:
            StartupError: a port cannot be opened.
        """
        grpc_config, http_config = self._config.grpc, self._config.http
        self._update_health()
        credentials = self.certificates.grpc_credentials() if self.certificates else None
        port = _bind_grpc(self._grpc, grpc_config.host, grpc_config.port, credentials)
        self.grpc_address = _address(grpc_config.host, port)
        if http_config.enabled:
            sock = _bind_http(http_config.host, http_config.port)
            self.http_address = _address(http_config.host, sock.getsockname()[1])
            self._http = self._make_http(sock)
            self._tasks.append(asyncio.create_task(self._http.run_until_stopped(), name="http"))
        # Before the first request, which must not be answered by the wrong policy.
        await self.deployment.directory.refresh()
        await self._grpc.start()
        self._tasks.append(asyncio.create_task(self.deployment.keeper.run(), name="deployments"))
        self._tasks.append(asyncio.create_task(self._watch_health(), name="health"))
        self._tasks.append(asyncio.create_task(self.feedback.upkeep.run(), name="upkeep"))
        if self.certificates is not None:
            watch = self.certificates.watch()
            self._tasks.append(asyncio.create_task(watch, name="certificates"))
        await self.engine.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within grace_s, then cut them short and stop."""
        self.begin_draining()
        if not await self._interceptor.wait_idle(grace_s, self._hurry):
            log.warning("calls are cut short", num_calls=self._interceptor.num_in_flight)
            self._generator.cancel_all()
            await self._interceptor.wait_idle(_CUT_SHORT_S, self._hurry)
        await self._grpc.stop(None)
        await self.engine.stop()
        if self._http is not None:
            self._http.stop()
        for task in self._tasks:
            if task.get_name() != "http":
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._text.close()
        await self.feedback.close()

    def hurry(self) -> None:
        """End a stop that is under way without waiting for calls any longer."""
        self._hurry.set()

    def begin_draining(self) -> None:
        """Report NOT_SERVING and refuse new calls from now on."""
        self.readiness.draining = True
        self._interceptor.draining = True
        self._update_health()

    def _make_deployment(self, model: ServedModel) -> DeploymentParts:
        store, metrics = self.feedback.store, self.metrics.loop
        template_hash = model.template.identity
        return make_deployment(
            self._config, store, self.engine, metrics, model.base_id, template_hash
        )

    def _make_scorer(self) -> Scorer:
        return Scorer(
            self.engine,
            self.readiness,
            self._text,
            self._admission,
            self._quotas.tokens,
            self.deployment.door,
        )

    def _make_generator(self, model: ServedModel) -> Generator:
        return Generator(
            engine=self.engine,
            readiness=self.readiness,
            text=self._text,
            admission=self._admission,
            metrics=self.metrics,
            log=self.feedback.log,
            quota=self._quotas.tokens,
            door=self.deployment.door,
            observations=self.deployment.observations,
            model_name=model.name,
        )

    def _make_grpc(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=[
                # Two servers on one port would share its calls silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._config.grpc.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        limits, interval_s = self._config.limits, self._config.stream_interval_s
        parts = self.feedback
        reader = FeedbackReader(parts.store, parts.tokens, self._config.profile)
        inference = InferenceService(
            self._generator, self._scorer, self._text, reader, limits, interval_s
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(self._make_feedback(reader), server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(self.models, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.grpc.reflection:
            names = (INFERENCE, FEEDBACK, MODELS, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _make_models(self, model: ServedModel) -> ModelService:
        store, parts = self.feedback.store, self.deployment
        quantize = self._config.model.quantize
        describer = Describer(store, parts, self.engine, model.name, str(model.path), quantize)
        return ModelService(store, parts, describer, self._admission, self.readiness)

    def _make_http(self, sock: socket.socket) -> HttpServer:
        async def admit(request: Request) -> None:
            (await self.keyring.caller_of(request.headers.items())).require(ADMIN)

        is_exposed = "http.host" in self._config.exposed
        app = make_app(
            self.metrics.registry,
            self.readiness.reason,
            admit_metrics=admit if is_exposed else None,
        )
        tls = self.certificates.http_context if self.certificates is not None else None
        return HttpServer(app, sock, tls)

    def _make_comparing(self) -> Comparing:
        parts, door = self.feedback, self.deployment.door
        base_id = parts.settings.base_id
        uncertainty = Uncertainty(parts.store, self._scorer, door, base_id)
        return Comparing(
            self._generator, parts.log, parts.store, parts.tokens, parts.recent, door, uncertainty
        )

    def _make_feedback(self, reader: FeedbackReader) -> FeedbackService:
        parts, metrics = self.feedback, self.metrics.feedback
        store, tokens, recent = parts.store, parts.tokens, parts.recent
        settings = parts.settings
        return FeedbackService(
            parts,
            FeedbackDesk(store, tokens, recent, metrics, self._config.profile),
            reader,
            self.comparing,
            Importer(store, self._text, metrics, settings.base_id, settings.template_hash),
            self._config.limits,
            self._quotas.feedback,
        )

    def _on_engine_state(self, state: EngineState) -> None:
        figures = self.metrics.engine
        figures.up = state is EngineState.READY
        figures.info = self.engine.info
        figures.num_restarts = self.engine.num_restarts
        log.debug("engine state", state=state.value)
        self.deployment.keeper.wake()
        if state is EngineState.READY and figures.num_restarts:
            log.info("engine serves again", num_restarts=figures.num_restarts)
        self._update_health()

    def _update_health(self) -> None:
        ready = not self.readiness.reason()
        self._health.set_serving("", ready)
        self._health.set_serving(INFERENCE, ready)
        self._health.set_serving(MODELS, not self.readiness.draining)
        recording = self.feedback.store.death is None and not self.readiness.draining
        self._health.set_serving(FEEDBACK, recording)

    async def _watch_health(self) -> None:
        """Notice an engine that falls silent, which no event tells."""
        while True:
            self._update_health()
            await asyncio.sleep(_HEALTH_INTERVAL_S)


def _bind_grpc(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(_address(host, port), credentials)
        return server.add_insecure_port(_address(host, port))
    except RuntimeError:
        raise StartupError(
            f"cannot listen on {_address(host, port)} (grpc.host, grpc.port): "
            "is another server running there?"
        ) from None


def _bind_http(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {_address(host, port)} (http.host, http.port): {error.strerror}"
        ) from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

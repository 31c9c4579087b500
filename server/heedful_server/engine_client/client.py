"""Supervises the engine child and talks to it.

Owns the child's process, the socket, the table of requests in flight and the restart policy; which
adapters the child has is kept in adapters.py. It knows nothing of gRPC, validation or tokenizers.
Everything here runs on the server's event loop. A child that dies takes its requests with it
(EngineUnavailable) and is started again after a growing pause; a child that reports that it cannot
serve the model is not.
"""

import asyncio
import contextlib
import enum
import os
import socket
import sys
import time
from collections.abc import Callable

import msgspec
import structlog

from heedful_server.engine_client.adapters import AdapterInfo, AdapterTable
from heedful_server.engine_client.stream import EngineStream
from heedful_server.errors import EngineRequestError, EngineUnavailable
from heedful_server.framing import FrameError, frame, read_frame
from heedful_server.protocol import (
    AdapterLoaded,
    AdapterRole,
    AdapterUnloaded,
    Cancel,
    Delta,
    EngineConfig,
    EngineInfo,
    EngineStats,
    Failed,
    FinishReason,
    FromEngine,
    Loading,
    Ready,
    Score,
    Scored,
    Shutdown,
    StepReport,
    Submit,
    ToEngine,
)

log = structlog.get_logger(__name__)

_RESTART_PAUSES_S = (0.2, 1.0, 5.0, 15.0)
_HEALTHY_AFTER_S = 60.0
_STOP_TIMEOUT_S = 5.0
_EXIT_TIMEOUT_S = 1.0


class EngineState(enum.Enum):
    """Where the child is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineClient:
    """The server's handle on the engine child."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_state: Callable[[EngineState], None],
        on_stats: Callable[[EngineStats], None],
        hang_timeout_s: float = 120.0,
    ) -> None:
        self._config = config
        self._on_state = on_state
        self._on_stats = on_stats
        self._hang_timeout_s = hang_timeout_s
        self.state = EngineState.STOPPED
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.loading: tuple[str, float] = ("starting", 0.0)
        self.failure = ""
        self.num_restarts = 0
        self._streams: dict[str, EngineStream] = {}
        self._scores: dict[str, asyncio.Future[Scored]] = {}
        self._adapters = AdapterTable(self._send)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._stopping = False
        self._last_report = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    @property
    def pid(self) -> int | None:
        """Process id of the living child."""
        return None if self._process is None else self._process.pid

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the child last reported."""
        return time.monotonic() - self._last_report

    @property
    def num_in_flight(self) -> int:
        """Requests that the child has not ended yet."""
        return len(self._streams) + len(self._scores)

    async def start(self) -> None:
        """Start supervising; READY arrives by on_state."""
        self._stopping = False
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Wait until the child serves; raise EngineUnavailable if it cannot."""
        await self._settled.wait()
        if self.state is not EngineState.READY or self.info is None:
            raise EngineUnavailable(self.failure or "the engine stopped")
        return self.info

    def submit(self, submit: Submit) -> EngineStream:
        """Hand a request to the child; raise EngineUnavailable at once when it does not serve."""
        self._require_ready()
        request_id = submit.request_id

        def send_cancel(reason: FinishReason) -> None:
            self._send(Cancel(request_id=request_id, reason=reason))

        def forget() -> None:
            self._streams.pop(request_id, None)

        stream = EngineStream(request_id, submit.n, send_cancel, forget)
        self._streams[request_id] = stream
        self._send(submit)
        return stream

    async def score(self, score: Score) -> Scored:
        """Return the log-probs of each item's completion tokens and its rewards, as asked for."""
        self._require_ready()
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._scores[score.request_id] = future
        self._send(score)
        try:
            return await future
        finally:
            if self._scores.pop(score.request_id, None) is not None:
                self._send(Cancel(request_id=score.request_id))

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters that take requests, by id; empty again when the child has died."""
        return self._adapters.loaded

    async def load_adapter(self, adapter_id: str, path: str, role: AdapterRole) -> AdapterInfo:
        """Load an adapter directory into a slot; one that is loaded already stays as it is.

        Raises:
            EngineRequestError: its files are unusable ("invalid"), or no slot is free ("resource").
            EngineUnavailable: the child does not serve, or died meanwhile.
        """
        self._require_ready()
        return await self._adapters.load(adapter_id, path, role)

    async def unload_adapter(self, adapter_id: str) -> None:
        """Refuse new requests for an adapter now, and return when its slot is free.

        An adapter that is not there is free already, and so is every adapter of a dead child.

        Raises:
            EngineRequestError: somebody loaded it again while its last requests were running.
            EngineUnavailable: the child does not serve.
        """
        self._require_ready()
        await self._adapters.unload(adapter_id)

    async def stop(self) -> None:
        """End the child and fail whatever is in flight."""
        self._stopping = True
        self._send(Shutdown())
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                self._kill()
        if self._supervisor is not None:
            await self._supervisor

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailable(self.failure or f"the engine is {self.state.value}")

    def _send(self, message: ToEngine) -> None:
        if self._writer is None or self._writer.is_closing():
            return
        self._writer.write(frame(self._encoder.encode(message)))

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        if state in (EngineState.READY, EngineState.FAILED, EngineState.STOPPED):
            self._settled.set()
        else:
            self._settled.clear()
        self._on_state(state)

    async def _supervise(self) -> None:
        num_failures = 0
        while not self._stopping:
            self._set_state(EngineState.LOADING)
            started_at = time.monotonic()
            reader = await self._spawn()
            watchdog = asyncio.create_task(self._kill_when_hung(), name="engine-watchdog")
            try:
                await self._read_reports(reader)
            finally:
                watchdog.cancel()
            exit_code = await self._bury()
            if self._stopping or self.state is EngineState.FAILED:
                break
            num_failures = 0 if time.monotonic() - started_at > _HEALTHY_AFTER_S else num_failures
            pause_s = _RESTART_PAUSES_S[min(num_failures, len(_RESTART_PAUSES_S) - 1)]
            num_failures += 1
            self.num_restarts += 1
            log.error("engine died", exit_code=exit_code, restart_in_s=pause_s)
            self._set_state(EngineState.RESTARTING)
            await asyncio.sleep(pause_s)
        if self.state is not EngineState.FAILED:
            self._set_state(EngineState.STOPPED)

    async def _spawn(self) -> asyncio.StreamReader:
        ours, childs = socket.socketpair()
        with childs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "heedful_server.engine.main",
                str(childs.fileno()),
                pass_fds=(childs.fileno(),),
                # Threads that spin between parallel regions would starve the server on few cores.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                stdin=asyncio.subprocess.DEVNULL,
                # A process group of its own keeps a terminal's Ctrl-C from reaching the child
                # before the server has drained.
                start_new_session=True,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(frame(self._encoder.encode(self._config)))
        self._last_report = time.monotonic()
        return reader

    async def _read_reports(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                payload = await read_frame(reader)
                if payload is None:
                    return
                message = self._decoder.decode(payload)
            except (FrameError, msgspec.MsgspecError) as error:
                log.error("engine sent what cannot be read", error=str(error))
                self._kill()
                return
            self._last_report = time.monotonic()
            self._dispatch(message)

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case StepReport():
                for delta in message.deltas:
                    self._deliver(delta)
                self.stats = message.stats
                self._on_stats(message.stats)
            case Scored():
                future = self._scores.pop(message.request_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case AdapterLoaded():
                self._adapters.take_loaded(message)
            case AdapterUnloaded():
                self._adapters.take_unloaded(message)
            case Failed():
                self._fail_request(message)
            case Loading():
                self.loading = (message.stage, message.fraction)
            case Ready():
                self.info = message.info
                self._set_state(EngineState.READY)

    def _deliver(self, delta: Delta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        stream.push(delta)
        if stream.finished:
            del self._streams[delta.request_id]

    def _fail_request(self, failed: Failed) -> None:
        if not failed.request_id:
            self.failure = failed.message
            self._set_state(EngineState.FAILED)
            return
        error = EngineRequestError(failed.kind, failed.message, failed.field)
        stream = self._streams.pop(failed.request_id, None)
        if stream is not None:
            stream.fail(error)
        future = self._scores.pop(failed.request_id, None)
        if future is not None and not future.done():
            future.set_exception(error)
        self._adapters.take_failure(failed.request_id, error)

    async def _kill_when_hung(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._hang_timeout_s / 4))
            if self.state is EngineState.READY and self.heartbeat_age_s > self._hang_timeout_s:
                log.error("engine hangs", heartbeat_age_s=round(self.heartbeat_age_s, 1))
                self._kill()
                return

    async def _bury(self) -> int:
        assert self._process is not None
        assert self._writer is not None
        self._writer.close()
        # Killing a child that has just ended would lose its exit code, which tells why it ended.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _EXIT_TIMEOUT_S)
        self._kill()
        exit_code = await self._process.wait()
        self._process = self._writer = None
        gone = EngineUnavailable(self.failure or "the engine died; it is being restarted")
        for stream in self._streams.values():
            stream.fail(gone)
        for future in self._scores.values():
            if not future.done():
                future.set_exception(gone)
        self._streams.clear()
        self._scores.clear()
        self._adapters.lose_all(gone)
        self.stats = EngineStats()
        self._on_stats(self.stats)
        return exit_code

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

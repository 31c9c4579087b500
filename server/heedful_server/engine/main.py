"""Entry point of the engine child process: `python -m heedful_server.engine.main FD`.

Owns the process: the inherited socket, the reader and writer threads, loading, the loop that
calls the engine. The main thread steps the model; the reader puts messages into the inbox; the
writer sends frames, so that a server that reads slowly never holds up a step; two more threads
compile grammars and read adapters, and put what they have into the inbox. When the server goes
away the socket closes and this process ends at once.
"""

import os
import queue
import socket
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import structlog

from heedful_server.engine.adapter_loader import AdapterLoader, LoadedAdapter
from heedful_server.engine.constraint import CompiledConstraint, GrammarCompiler
from heedful_server.engine.engine import Engine
from heedful_server.engine.loading import LoadedEngine, load_engine
from heedful_server.errors import EngineRequestError, HeedfulServerError
from heedful_server.framing import frame, receive_frame
from heedful_server.logging_setup import configure_logging
from heedful_server.protocol import (
    Cancel,
    Delta,
    EngineConfig,
    Failed,
    FromEngine,
    LoadAdapter,
    Loading,
    Ready,
    Score,
    Shutdown,
    StepReport,
    Submit,
    ToEngine,
    UnloadAdapter,
)

log = structlog.get_logger(__name__)

_HEARTBEAT_S = 1.0
EXIT_CANNOT_SERVE = 3


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request's constraint is compiled, or the future holds why it cannot be."""

    request_id: str
    future: "Future[CompiledConstraint]"


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter is read into its slot, or the future's result says why it cannot be."""

    adapter_id: str
    future: "Future[LoadedAdapter]"


class Channel:
    """The child's end of the socket, with one thread for each direction."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.inbox: queue.SimpleQueue[ToEngine | Compiled | Read] = queue.SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)

    def receive_config(self) -> EngineConfig:
        """Block until the first frame."""
        payload = receive_frame(self._sock)
        if payload is None:
            os._exit(0)
        return msgspec.msgpack.decode(payload, type=EngineConfig)

    def start(self) -> None:
        """Start both threads."""
        self._writer.start()
        self._reader.start()

    def send(self, message: FromEngine) -> None:
        """Queue a message for the server."""
        self._outbox.put(frame(self._encoder.encode(message)))

    def close(self) -> None:
        """Send what is queued, then stop writing."""
        self._outbox.put(None)
        self._writer.join(timeout=5.0)

    def _write(self) -> None:
        while (payload := self._outbox.get()) is not None:
            try:
                self._sock.sendall(payload)
            except OSError:
                os._exit(0)

    def _read(self) -> None:
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        while (payload := receive_frame(self._sock)) is not None:
            self.inbox.put(decoder.decode(payload))
        # The server is gone: nobody waits for an answer, and an orphan would hold the memory.
        os._exit(0)


class Loop:
    """The main thread's loop: messages in, steps, reports out."""

    def __init__(self, channel: Channel, loaded: LoadedEngine) -> None:
        self._channel = channel
        self._engine: Engine = loaded.engine
        self._compiler: GrammarCompiler = loaded.compiler
        self._adapter_loader: AdapterLoader = loaded.adapter_loader
        self._running = True

    def run(self) -> None:
        """Serve until the server says otherwise."""
        engine = self._engine
        checked = False
        while self._running:
            if engine.has_work:
                self._take_messages(block=False)
                self._step()
                checked = False
                continue
            self._report(0.0, 0)
            if not checked and not engine.has_requests:
                engine.check_integrity()
                checked = True
            self._take_messages(block=True)

    def _step(self) -> None:
        started_s = time.perf_counter()
        num_tokens = self._engine.step()
        self._report(time.perf_counter() - started_s, num_tokens)

    def _take_messages(self, block: bool) -> None:
        inbox = self._channel.inbox
        try:
            message = inbox.get(timeout=_HEARTBEAT_S) if block else inbox.get_nowait()
            while True:
                self._handle(message)
                message = inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, message: ToEngine | Compiled | Read) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Score():
                self._engine.score(message)
            case Cancel():
                self._engine.cancel(message.request_id, message.reason)
            case Compiled():
                self._release(message)
            case LoadAdapter():
                self._load_adapter(message)
            case UnloadAdapter():
                self._engine.unload_adapter(message.adapter_id)
            case Read():
                self._engine.finish_load(message.adapter_id, message.future.result())
            case Shutdown():
                self._running = False

    def _submit(self, message: Submit) -> None:
        self._engine.submit(message)
        if message.constraint is None:
            return
        request_id, inbox = message.request_id, self._channel.inbox
        future = self._compiler.compile(message.constraint)
        # Runs in the compiler's thread; the inbox wakes the main thread.
        future.add_done_callback(lambda done: inbox.put(Compiled(request_id, done)))

    def _release(self, compiled: Compiled) -> None:
        try:
            constraint = compiled.future.result()
        except EngineRequestError as error:
            self._engine.refuse(compiled.request_id, error)
            return
        self._engine.release(compiled.request_id, constraint)

    def _load_adapter(self, message: LoadAdapter) -> None:
        job = self._engine.load_adapter(message)
        if job is None:
            return
        adapter_id, inbox = job.adapter_id, self._channel.inbox
        future = self._adapter_loader.load(job)
        # Runs in the loader's thread; the inbox wakes the main thread.
        future.add_done_callback(lambda done: inbox.put(Read(adapter_id, done)))

    def _report(self, step_s: float, num_tokens: int) -> None:
        reports = self._engine.take_reports()
        deltas = [report for report in reports if isinstance(report, Delta)]
        stats = self._engine.stats(step_s, num_tokens)
        # First, so that an adapter is said to be gone after the last words of its last request.
        self._channel.send(StepReport(deltas, stats))
        for report in reports:
            if not isinstance(report, Delta):
                self._channel.send(report)


def main() -> None:
    """Load the model, then serve until the socket closes."""
    # The descriptor is ours alone: a grandchild must not keep the socket open.
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    channel = Channel(sock)
    config = channel.receive_config()
    channel.start()
    configure_logging(config.log_level)

    def progress(stage: str, fraction: float) -> None:
        channel.send(Loading(stage, fraction))

    try:
        loaded = load_engine(config, progress)
    except (HeedfulServerError, OSError, ValueError, MemoryError) as error:
        log.error("the model cannot be served", error=str(error))
        channel.send(Failed("", "not_loaded", str(error), "model"))
        channel.close()
        sys.exit(EXIT_CANNOT_SERVE)
    channel.send(Ready(loaded.info))
    Loop(channel, loaded).run()
    loaded.compiler.close()
    loaded.adapter_loader.close()
    channel.close()


if __name__ == "__main__":
    main()

"""Server and trainer side by side: started, restarted, drained, their lines passed on.

Owns the life of the two processes and the exit code that follows from it; knows neither options nor
how lines look. The server decides: when it ends, everything ends. A trainer that crashes is started
again after a growing pause and touches no request. Runs on one event loop.
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STEADY_S = 60.0
"""Seconds of work after which a crash counts as the first one again."""
WRONG_USAGE = 2
_LINE_BYTES = 1 << 20
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Emit = Callable[[str, str], None]
"""Takes the name of a program and one of its lines."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run: its name in the log, its arguments, and what it gets in its environment."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """One running process whose lines are passed on."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, emit: Emit) -> None:
        self._process = process
        self._pump = asyncio.create_task(_pass_on(process, name, emit))

    async def wait(self) -> int:
        """Returns the exit code once the process has ended and said its last line."""
        code = await self._process.wait()
        await self._pump
        return code

    def stop(self, number: signal.Signals) -> None:
        """Sends a signal; no effect once it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


async def start(command: Command, emit: Emit) -> Child:
    """Starts a program out of reach of the terminal's Ctrl-C, which is for us to pass on.

    Raises:
        OSError: it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *command.arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(command.environment),
        limit=_LINE_BYTES,
        start_new_session=True,
    )
    return Child(process, command.name, emit)


class Supervisor:
    """Runs a server and, once it is ready, a trainer beside it, until a signal or its end."""

    def __init__(
        self,
        server: Command,
        trainer: Command,
        until_ready: Callable[[], Awaitable[None]],
        emit: Emit,
        *,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._server_command = server
        self._trainer_command = trainer
        self._until_ready = until_ready
        self._emit = emit
        self._first_pause_s = first_pause_s
        self._stopping = asyncio.Event()
        self._num_signals = 0
        self._children: list[Child] = []
        self._wrong_usage = False

    async def run(self) -> int:
        """Runs both and returns the exit code: the server's, or 2 for a misconfigured trainer.

        Raises:
            OSError: a program cannot be started.
        """
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            return await self._run()
        finally:
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    async def _run(self) -> int:
        server = await self._start(self._server_command)
        ended = asyncio.create_task(server.wait())
        training = asyncio.create_task(self._keep_training())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((ended, training, stopping), return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not self._stopping.is_set():
            self._say(f"the server ended with code {ended.result()}")
        self._stopping.set()
        self._signal_all(signal.SIGTERM)
        code = await ended
        await training
        await stopping
        if self._wrong_usage:
            return WRONG_USAGE
        # A process that a signal ended has a negative code, which shells do not know.
        return code if code >= 0 else 1

    async def _keep_training(self) -> None:
        """Keeps a trainer at work until everything stops."""
        if not await self._ready():
            return
        loop = asyncio.get_running_loop()
        pause_s, is_first = self._first_pause_s, True
        while not self._stopping.is_set():
            began_s = loop.time()
            code = await (await self._start(self._trainer_command)).wait()
            if self._stopping.is_set():
                return
            if code == WRONG_USAGE and is_first:
                self._say("the trainer's configuration is wrong")
                self._wrong_usage = True
                return
            is_first = False
            if loop.time() - began_s >= STEADY_S:
                pause_s = self._first_pause_s
            self._say(f"the trainer ended with code {code}; again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _ready(self) -> bool:
        """Waits for the server; returns False where everything stops before."""
        ready = asyncio.ensure_future(self._until_ready())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (ready, stopping):
            task.cancel()
        await asyncio.gather(ready, stopping, return_exceptions=True)
        return not self._stopping.is_set()

    async def _start(self, command: Command) -> Child:
        child = await start(command, self._emit)
        self._children.append(child)
        if self._stopping.is_set():
            child.stop(signal.SIGTERM)
        return child

    def _on_signal(self) -> None:
        """Drains at the first signal, hurries at the second, kills at the third."""
        self._num_signals += 1
        if self._num_signals == 1:
            self._say("stopping; again to hurry")
            self._stopping.set()
        else:
            self._signal_all(signal.SIGTERM if self._num_signals == 2 else signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for child in self._children:
            child.stop(number)

    def _say(self, line: str) -> None:
        self._emit("heedful", line)


async def _pass_on(process: asyncio.subprocess.Process, name: str, emit: Emit) -> None:
    assert process.stdout is not None
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:
            # A line beyond all bounds; what is left of it follows as one of its own.
            continue
        if not line:
            return
        emit(name, line.decode(errors="replace").rstrip("\n"))

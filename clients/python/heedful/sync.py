"""The synchronous client: the asynchronous one, run on an event loop in a thread of its own.

Owns that thread and the bridge to it, and no logic of its own: every method is the asynchronous
one, waited for. Safe to use from any number of threads. Interrupting a wait (Ctrl-C) cancels the
call.
"""

import asyncio
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from heedful.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, AsyncClient
from heedful.stream import AsyncGenerationStream
from heedful.transport import TLS
from heedful.types import Delta, GenerateOptions, Generation, Prompt, ServedBy

P = ParamSpec("P")
T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a daemon thread until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Nothing may be handed over after the last work, or its caller would wait for ever. Taken
        # again by its holder where the garbage collector ends an abandoned stream under it.
        self._handover = threading.RLock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run_loop, name="heedful-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` on the loop and waits; an exception here, as by Ctrl-C, cancels it.

        Raises:
            RuntimeError: the loop was stopped.
        """
        with self._handover:
            if self._stopped:
                coroutine.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def call(self, function: Callable[[], object]) -> None:
        """Runs `function` on the loop and waits; nothing happens once the loop was stopped."""
        if threading.current_thread() is self._thread:
            # The garbage collector may end an abandoned iteration here: waiting would be forever.
            function()
        elif not self._stopped:
            with contextlib.suppress(RuntimeError):
                self.run(_as_coroutine(function))

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs `last`, ends what still runs on the loop, then the thread."""
        with self._handover:
            self._stopped = True
            future = asyncio.run_coroutine_threadsafe(_finish(last), self._loop)
        # The callback runs here where the work is done already, so the loop must be woken to stop.
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        # On the loop itself, where only the garbage collector gets to, waiting would be for ever.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.close()


def _waiting(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.run(method(self._core, *args, **kwargs))

    # wraps() would give type checkers the method's own `self`; only its texts are wanted.
    functools.update_wrapper(call, method)
    return call


def _iterating(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate["Client", P], Iterator[T]]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return _items(self._thread, method(self._core, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


class Client:
    """A connection to one heedful server, for programs without an event loop.

    Takes the arguments of `AsyncClient`. Close it, or use it in a `with` block.
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
        self._core = AsyncClient(
            target,
            api_key=api_key,
            tls=tls,
            project=project,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
        )
        self.target = target
        self.project = project
        self._thread = LoopThread()
        # Also runs at the exit of the interpreter, while gRPC can still be closed in order.
        self._finalizer = weakref.finalize(self, _shut_down, self._core, self._thread)

    generate = _waiting(AsyncClient.generate)
    score = _waiting(AsyncClient.score)
    tokenize = _waiting(AsyncClient.tokenize)
    detokenize = _waiting(AsyncClient.detokenize)
    health = _waiting(AsyncClient.health)
    wait_ready = _waiting(AsyncClient.wait_ready)
    rate = _waiting(AsyncClient.rate)
    grade = _waiting(AsyncClient.grade)
    rank = _waiting(AsyncClient.rank)
    correct = _waiting(AsyncClient.correct)
    critique = _waiting(AsyncClient.critique)
    label = _waiting(AsyncClient.label)
    compare = _waiting(AsyncClient.compare)
    next_question = _waiting(AsyncClient.next_question)
    submit = _waiting(AsyncClient.submit)
    retract = _waiting(AsyncClient.retract)
    feedback = _waiting(AsyncClient.feedback)
    list_feedback = _iterating(AsyncClient.list_feedback)
    export_feedback = _iterating(AsyncClient.export_feedback)
    import_feedback = _waiting(AsyncClient.import_feedback)
    erase_user = _waiting(AsyncClient.erase_user)
    summarize_feedback = _waiting(AsyncClient.summarize_feedback)
    completion = _waiting(AsyncClient.completion)
    list_models = _waiting(AsyncClient.list_models)
    get_model = _waiting(AsyncClient.get_model)
    promote = _waiting(AsyncClient.promote)
    roll_back = _waiting(AsyncClient.roll_back)
    deployments = _iterating(AsyncClient.deployments)
    start_refresh = _waiting(AsyncClient.start_refresh)
    get_refresh = _waiting(AsyncClient.get_refresh)
    list_refreshes = _waiting(AsyncClient.list_refreshes)
    control_refresh = _waiting(AsyncClient.control_refresh)
    watch_refresh = _iterating(AsyncClient.watch_refresh)
    load_adapter = _waiting(AsyncClient.load_adapter)
    unload_adapter = _waiting(AsyncClient.unload_adapter)
    get_load = _waiting(AsyncClient.get_load)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> "GenerationStream":
        """Returns completions of `prompt` as they are sampled; see `AsyncClient.stream`."""
        return GenerationStream(self._thread, self._core.stream(prompt, **options))

    def close(self) -> None:
        """Closes the connection and ends the thread; calls in flight end as cancelled."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class GenerationStream:
    """Deltas of one generation; leaving the loop early, or the `with` block, cancels it."""

    def __init__(self, thread: LoopThread, core: AsyncGenerationStream) -> None:
        self._thread = thread
        self._core = core

    def head(self) -> ServedBy:
        """Waits until the generation has begun and returns what answers.

        Raises:
            HeedfulError: it could not begin.
        """
        return self._thread.run(self._core.head())

    def __iter__(self) -> Iterator[Delta]:
        try:
            while (delta := self._thread.run(self._core.next())) is not None:
                yield delta
        finally:
            self.cancel()

    def texts(self) -> Iterator[str]:
        """Yields pieces of the first completion's text as they arrive."""
        for delta in self:
            if delta.index == 0 and delta.text:
                yield delta.text

    @property
    def generation(self) -> Generation:
        """Everything that has arrived so far; complete once the iteration has ended.

        Raises:
            RuntimeError: nothing has arrived yet.
        """
        return self._core.generation

    def cancel(self) -> None:
        """Ends the generation; no effect once it has ended."""
        self._thread.call(self._core.cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


def _items(thread: LoopThread, generator: AsyncGenerator[T, None]) -> Iterator[T]:
    while (item := thread.run(_next(generator))) is not None:
        try:
            yield item
        except GeneratorExit:
            # The generator waits at its own yield, so its end needs no more than one step.
            thread.call(lambda: asyncio.ensure_future(generator.aclose()))
            raise


async def _next(generator: AsyncGenerator[T, None]) -> T | None:
    return await anext(generator, None)


async def _as_coroutine(function: Callable[[], object]) -> None:
    function()


async def _finish(last: Coroutine[Any, Any, None]) -> None:
    await last
    # gRPC's calls end in tasks of their own, a little after the channel has closed.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if not others:
        return
    _, late = await asyncio.wait(others, timeout=1.0)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)


def _shut_down(core: AsyncClient, thread: LoopThread) -> None:
    thread.stop(core.close())

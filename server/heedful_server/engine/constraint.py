"""Constrained output: from a JSON schema or a regular expression to a bitmask for every token.

Owns the cache of compiled grammars, the process that compiles them (constraint_worker.py says what
it accepts) and the matcher that follows one completion. It knows nothing of sampling or sequences.

Threads: GrammarCompiler.compile and everything of GrammarMatcher are called in the engine child's
main thread and never wait; one thread of the compiler waits for the worker process. A constraint
that is hostile costs its own request: compiling is limited in time, memory and size and happens
elsewhere; a grammar that proves slow while it is followed fails that completion.

A regular expression means what Python's `re` means by it under re.ASCII | re.DOTALL, for the whole
completion; what only one of `re` and xgrammar understands (look-around, back-references, word
boundaries, flags, `^` or `$` in the middle) is refused. schema_subset.py says which schemas are.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import torch
from torch import Tensor

from heedful_server.engine.constraint_worker import Job, Outcome
from heedful_server.engine.grammar_vocabulary import (
    TokenRules,
    Vocabulary,
    token_rules,
    tokenizer_info,
    vocabulary_of,
    without_controls,
)
from heedful_server.errors import EngineRequestError
from heedful_server.framing import frame, receive_frame
from heedful_server.protocol import Constraint
from heedful_server.text.tokenizer import Tokenizer

MAX_TEXT_BYTES = {"json_schema": 64 << 10, "regex": 4 << 10}

_WORKER_MODULE = "heedful_server.engine.constraint_worker"
_DEFAULT_LIMIT_S = 10.0
_START_LIMIT_S = 120.0
_MAX_PENDING = 32
_MAX_CACHED = 64
_MAX_CACHED_BYTES = 256 << 20

# Of the step loop's time a completion may take this much for its masks, and this much more for
# every token; grammars that people write take a tenth of it.
_MATCHER_ALLOWANCE_S = 0.5
_MATCHER_ALLOWANCE_PER_TOKEN_S = 0.005


class InvalidConstraint(EngineRequestError):  # noqa: N818 - named as in heedful_server.errors
    """The constraint cannot be followed; field is `constraint.json_schema` or `.regex`."""

    def __init__(self, constraint: Constraint, reason: str) -> None:
        self.reason = reason
        field = f"constraint.{constraint.kind}"
        super().__init__("invalid", f"{field}: {reason}", field)


class GrammarMatcher:
    """Follows one completion through its grammar.

    It depends on the completion's tokens alone, so it outlives a preemption unchanged.
    """

    def __init__(self, grammar: Any, rules: TokenRules) -> None:
        # Imported late: it takes seconds, and most engines never see a constraint.
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._rules = rules
        self._token_ids: list[int] = []
        self._mask_W: Tensor | None = None
        self._spent_s = 0.0
        self.failure: str | None = None

    @property
    def terminated(self) -> bool:
        """Whether an end-of-sequence token has been accepted: nothing may follow."""
        return bool(self._matcher.is_terminated())

    @property
    def completed(self) -> bool:
        """Whether the completion satisfies the grammar as it stands."""
        return bool(self._matcher.is_completed()) and self.failure is None

    @property
    def only_end_allowed(self) -> bool:
        """Whether nothing but an end-of-sequence token may follow."""
        if self.terminated:
            return True
        mask_W = self.bitmask()
        return bool(mask_W.any()) and not (mask_W & ~self._rules.stop_W).any()

    def bitmask(self) -> Tensor:
        """Return which tokens may follow: int32 [ceil(V / 32)], bit i % 32 of word i // 32 for i.

        All zeros, with `failure` set, where the grammar cannot be followed any further.
        """
        if self._mask_W is None:
            self._mask_W = torch.zeros_like(self._rules.known_W)
            self._timed(self._fill)
        return self._mask_W

    def accept(self, token_id: int) -> bool:
        """Advance by a sampled token; False, with `failure` set, where the grammar forbids it."""
        self._mask_W = None
        self._token_ids.append(token_id)
        accepted: list[bool] = []
        self._timed(lambda: accepted.append(bool(self._matcher.accept_token(token_id))))
        if accepted != [True] and self.failure is None:
            self.failure = f"token {token_id} does not follow the constraint"
        return self.failure is None

    def rollback(self, num_tokens: int) -> None:
        """Take back the last num_tokens accepted tokens."""
        assert self.failure is None, "a failed matcher has no state to go back to"
        assert num_tokens <= len(self._token_ids), "more tokens than were accepted"
        self._matcher.rollback(num_tokens)
        del self._token_ids[len(self._token_ids) - num_tokens :]
        self._mask_W = None

    def _fill(self) -> None:
        assert self._mask_W is not None
        if self.failure is not None or self.terminated:
            return
        self._matcher.fill_next_token_bitmask(self._mask_W[None])
        # xgrammar sets the bits between the last token and the end of its word.
        self._mask_W &= self._rules.known_W
        lead = self._rules.lead_of_token.get(self._token_ids[-1]) if self._token_ids else None
        if lead is not None:
            self._mask_W &= self._rules.after_lead[lead]

    def _timed(self, call: Callable[[], None]) -> None:
        started_s = time.thread_time()
        try:
            call()
        except RuntimeError as error:
            self.failure = f"the constraint cannot be followed: {error}"
        self._spent_s += time.thread_time() - started_s
        num_tokens = len(self._token_ids)
        allowance_s = _MATCHER_ALLOWANCE_S + num_tokens * _MATCHER_ALLOWANCE_PER_TOKEN_S
        if self._spent_s > allowance_s:
            self.failure = "the constraint is too ambiguous to be followed at speed"
        if self.failure is not None and self._mask_W is not None:
            self._mask_W.zero_()


class CompiledConstraint:
    """A compiled grammar; any number of completions can follow it."""

    def __init__(self, grammar: Any, rules: TokenRules) -> None:
        self._grammar = grammar
        self._rules = rules

    @property
    def memory_bytes(self) -> int:
        """About how much memory the grammar takes."""
        return int(self._grammar.memory_size_bytes)

    def matcher(self, completion_token_ids: Sequence[int] = ()) -> GrammarMatcher:
        """Return a matcher that stands behind the given tokens."""
        matcher = GrammarMatcher(self._grammar, self._rules)
        for token_id in completion_token_ids:
            matcher.accept(token_id)
        return matcher


def fill_bitmasks(matchers: Sequence[GrammarMatcher | None]) -> list[Tensor | None]:
    """Return the bitmask of every matcher, None for None."""
    return [None if matcher is None else matcher.bitmask() for matcher in matchers]


class GrammarCompiler:
    """Compiles constraints for one tokenizer, each once.

    Nothing is started before the first constraint. close() ends the worker process; so does the end
    of this process.

    Args:
        tokenizer: what token ids mean; special tokens but the end of sequence are never allowed.
        vocab_size: the model's, at least as large as the tokenizer's.
        limit_s: wall-clock time to compile one constraint.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limit_s: float = _DEFAULT_LIMIT_S
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limit_s = limit_s
        self._cache: OrderedDict[Constraint, Future[CompiledConstraint]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="constraint-compiler")
        self._worker: _Worker | None = None
        self._closed = threading.Event()
        # Of the compiler's thread alone.
        self._tokens: _Tokens | None = None

    def compile(self, constraint: Constraint) -> "Future[CompiledConstraint]":
        """Return the compiled constraint, at once a future and soon or already its result.

        The future raises InvalidConstraint for what cannot be followed, and EngineRequestError of
        kind "resource" where too many constraints are waiting. Its callbacks run in the compiler's
        thread, or here where it is done already.
        """
        known = self._cache.get(constraint)
        if known is not None and not _failed_by_accident(known):
            self._cache.move_to_end(constraint)
            return known
        refused: Future[CompiledConstraint] = Future()
        limit = MAX_TEXT_BYTES[constraint.kind]
        if len(constraint.text.encode(errors="surrogatepass")) > limit:
            refused.set_exception(InvalidConstraint(constraint, f"longer than {limit} bytes"))
            return refused
        if sum(not future.done() for future in self._cache.values()) >= _MAX_PENDING:
            refused.set_exception(
                EngineRequestError(
                    "resource", "too many constraints wait to be compiled", "constraint"
                )
            )
            return refused
        future = self._thread.submit(self._compile, constraint)
        self._cache[constraint] = future
        self._evict()
        return future

    def close(self) -> None:
        """End the worker process and the thread; constraints under way fail."""
        self._closed.set()
        if self._worker is not None:
            self._worker.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()

    def _evict(self) -> None:
        done = [(key, future) for key, future in self._cache.items() if future.done()]
        size = sum(_memory_bytes(future) for _, future in done)
        for key, future in done:
            if len(self._cache) <= _MAX_CACHED and size <= _MAX_CACHED_BYTES:
                return
            size -= _memory_bytes(future)
            del self._cache[key]

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        if self._tokens is None:
            self._tokens = _Tokens(vocabulary_of(self._tokenizer, self._vocab_size))
        if not self._tokens.vocabulary.stop_token_ids:
            raise InvalidConstraint(constraint, "the model has no end-of-sequence token")
        try:
            job = msgspec.msgpack.encode(Job(constraint.kind, constraint.text, self._limit_s))
        except UnicodeEncodeError as error:
            raise InvalidConstraint(constraint, "not valid Unicode") from error
        outcome = self._ask_worker(constraint, job, self._tokens.vocabulary)
        if outcome.error:
            raise InvalidConstraint(constraint, outcome.error)
        try:
            return self._tokens.load(constraint.kind, outcome.grammar)
        except RuntimeError as error:
            raise EngineRequestError("internal", str(error), "constraint") from error

    def _ask_worker(self, constraint: Constraint, job: bytes, vocabulary: Vocabulary) -> Outcome:
        try:
            if self._worker is None:
                self._worker = self._start_worker(vocabulary)
            return self._worker.ask(job, self._limit_s)
        except TimeoutError as error:
            self._drop_worker()
            reason = f"takes longer than {self._limit_s:g} s to compile"
            raise InvalidConstraint(constraint, reason) from error
        except ConnectionError as error:
            self._drop_worker()
            raise InvalidConstraint(constraint, "takes too much memory to compile") from error

    def _start_worker(self, vocabulary: Vocabulary) -> "_Worker":
        if self._closed.is_set():
            raise EngineRequestError("internal", "the engine is shutting down", "constraint")
        worker = _Worker()
        try:
            # Its imports take seconds, which are not on the account of the first constraint.
            worker.ask(msgspec.msgpack.encode(vocabulary), _START_LIMIT_S)
        except OSError as error:
            worker.close()
            reason = f"the constraint compiler does not start: {error}"
            raise EngineRequestError("internal", reason, "constraint") from error
        return worker

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._closed.is_set():
            raise EngineRequestError("internal", "the engine is shutting down", "constraint")


class _Tokens:
    """A vocabulary in the forms that serialized grammars are loaded with."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._rules = token_rules(vocabulary)
        self._infos: dict[str, Any] = {}

    def load(self, kind: str, grammar: str) -> CompiledConstraint:
        """Return a grammar that the worker has compiled."""
        import xgrammar

        if not self._infos:
            self._infos["json_schema"] = tokenizer_info(without_controls(self.vocabulary))
            self._infos["regex"] = tokenizer_info(self.vocabulary)
        loaded = xgrammar.CompiledGrammar.deserialize_json(grammar, self._infos[kind])
        return CompiledConstraint(loaded, self._rules)


class _Worker:
    """A worker process and the socket to it. All methods but kill: one thread at a time."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER_MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ask(self, request: bytes, limit_s: float) -> Outcome:
        """Send a request and wait for its outcome.

        Raises:
            TimeoutError: there is none within limit_s.
            ConnectionError: the process has ended.
        """
        self._sock.settimeout(limit_s)
        self._sock.sendall(frame(request))
        payload = receive_frame(self._sock)
        if payload is None:
            raise ConnectionResetError("the constraint worker has ended")
        return msgspec.msgpack.decode(payload, type=Outcome)

    def kill(self) -> None:
        """End the process now; a thread that waits for it gets ConnectionError."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and free the socket."""
        self.kill()
        self._sock.close()


def _failed_by_accident(future: "Future[CompiledConstraint]") -> bool:
    """Whether a failure was not the constraint's own, so that another attempt may succeed."""
    if not future.done():
        return False
    if future.cancelled():
        return True
    error = future.exception()
    return error is not None and not isinstance(error, InvalidConstraint)


def _memory_bytes(future: "Future[CompiledConstraint]") -> int:
    if not future.done() or future.cancelled() or future.exception() is not None:
        return 0
    return future.result().memory_bytes

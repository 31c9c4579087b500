"""The process that compiles constraints: `python -m heedful_server.engine.constraint_worker FD`.

Owns one compiler and answers one job at a time over a socket. It exists because a schema of 2 KB
can take minutes and gigabytes to compile, and a thread can be neither stopped nor limited: this
process can. It knows nothing of requests; its parent (constraint.py) keeps the time and kills it,
and its own alarm ends it where the parent is gone.
"""

import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from heedful_server.engine.grammar_vocabulary import (
    Vocabulary,
    tokenizer_info,
    without_controls,
)
from heedful_server.engine.schema_subset import SchemaError, guaranteed_schema
from heedful_server.framing import frame, receive_frame

MAX_SERIALIZED_BYTES = 16 << 20
MAX_WHITESPACE = 32

_MAX_MEMORY_BYTES = 2 << 30
_PROBE_TOKENS = 48
_PROBE_MAX_S = 0.1
_SOURCE_LOCATION = re.compile(r"^\[[\d:]+\] \S+?:\d+: ")


class Job(msgspec.Struct, frozen=True):
    """A constraint to compile; more than limit_s seconds later this process is gone."""

    kind: Literal["json_schema", "regex"]
    text: str
    limit_s: float


class Outcome(msgspec.Struct, frozen=True):
    """A serialized grammar, or why there is none."""

    grammar: str = ""
    error: str = ""


class _RefusedError(Exception):
    """The constraint cannot be followed."""


def main() -> None:
    """Serve jobs until the socket closes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    payload = receive_frame(sock)
    if payload is None:
        return
    compiler = _Compiler(msgspec.msgpack.decode(payload, type=Vocabulary))
    _limit_memory()
    sock.sendall(frame(msgspec.msgpack.encode(Outcome())))
    while (payload := receive_frame(sock)) is not None:
        job = msgspec.msgpack.decode(payload, type=Job)
        signal.alarm(int(job.limit_s) + 2)
        outcome = compiler.run(job)
        signal.alarm(0)
        sock.sendall(frame(msgspec.msgpack.encode(outcome)))


class _Compiler:
    """xgrammar's compilers for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Imported late: it takes seconds, and the parent imports the messages of this module.
        import xgrammar

        self._xgrammar = xgrammar
        self._vocab_size = vocabulary.vocab_size
        self._compilers = {
            kind: xgrammar.GrammarCompiler(
                tokenizer_info(tokens), max_threads=1, cache_enabled=False
            )
            for kind, tokens in (
                ("json_schema", without_controls(vocabulary)),
                ("regex", vocabulary),
            )
        }

    def run(self, job: Job) -> Outcome:
        """Compile a constraint and try it out."""
        try:
            with _captured_stderr() as complaints:
                grammar = self._compile(job)
                warning = re.search(r"Warning: (.*)", complaints.read_text(errors="replace"))
            if warning:
                raise _RefusedError(warning[1].strip())
            self._probe(grammar)
            serialized = grammar.serialize_json()
        except (_RefusedError, SchemaError) as error:
            return Outcome(error=str(error))
        except MemoryError:
            return Outcome(error="compiling it takes too much memory")
        except RuntimeError as error:
            message = _SOURCE_LOCATION.sub("", str(error)).strip()
            return Outcome(error=message[:500])
        if len(serialized) > MAX_SERIALIZED_BYTES:
            return Outcome(error="the compiled grammar is too large")
        return Outcome(grammar=serialized)

    def _compile(self, job: Job) -> Any:
        if job.kind == "json_schema":
            return self._compilers[job.kind].compile_json_schema(
                guaranteed_schema(job.text), max_whitespace_cnt=MAX_WHITESPACE
            )
        _check_regex(job.text)
        return self._compilers[job.kind].compile_regex(job.text)

    def _probe(self, grammar: Any) -> None:
        """Follow the grammar along random tokens; refuse it where that is impossible or slow."""
        matcher = self._xgrammar.GrammarMatcher(grammar)
        mask = self._xgrammar.allocate_token_bitmask(1, self._vocab_size)
        choices = random.Random(0)
        for _ in range(_PROBE_TOKENS):
            started_s = time.thread_time()
            matcher.fill_next_token_bitmask(mask)
            words = mask[0].tolist()
            allowed = [i for i in range(self._vocab_size) if words[i // 32] >> i % 32 & 1]
            if not allowed:
                raise _RefusedError("no text can satisfy it")
            matcher.accept_token(choices.choice(allowed))
            if time.thread_time() - started_s > _PROBE_MAX_S:
                raise _RefusedError("too ambiguous to be followed at the speed of generation")
            if matcher.is_terminated():
                return


def _check_regex(text: str) -> None:
    """Refuse what Python's re refuses: the accepted dialect is what both understand."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(text, re.ASCII | re.DOTALL)
    except RecursionError as error:
        raise _RefusedError("nested too deeply") from error
    except (re.error, OverflowError, FutureWarning, DeprecationWarning) as error:
        raise _RefusedError(str(error)) from error


@contextmanager
def _captured_stderr() -> Iterator[Path]:
    """Send this process's standard error, native code's too, to a file for a while."""
    with tempfile.NamedTemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield Path(file.name)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = Path("/proc/self/status")
    if not status.exists():
        return
    # What is mapped already (torch's libraries) is not the constraint's fault.
    mapped = re.search(r"VmData:\s+(\d+) kB", status.read_text())
    limit = _MAX_MEMORY_BYTES + (int(mapped[1]) * 1024 if mapped else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()

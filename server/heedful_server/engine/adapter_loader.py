"""Loads adapters beside the step loop, one at a time, in a thread of its own.

Owns that thread. Reading, checking and packing happen there, into a slot that no request has, so
that the main thread only has to say that the slot is in use from now on. Knows nothing of requests.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from heedful_server.engine.adapter_slots import LoadJob, LoadOutcome
from heedful_server.engine.runner import Runner
from heedful_server.errors import EngineRequestError
from heedful_server.model.errors import BadAdapter

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """How a job ended, and how long it took."""

    outcome: LoadOutcome | EngineRequestError
    load_s: float


class AdapterLoader:
    """The thread that fills slots."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")

    def load(self, job: LoadJob) -> Future[LoadedAdapter]:
        """Start a job; the future never holds an exception."""
        return self._executor.submit(self._load, job)

    def close(self) -> None:
        """Let the job in progress end, and start no other."""
        self._executor.shutdown(cancel_futures=True)

    def _load(self, job: LoadJob) -> LoadedAdapter:
        started_s = time.perf_counter()
        outcome: LoadOutcome | EngineRequestError
        try:
            outcome = self._runner.load_adapter(job.slot, job.path, job.role)
        except BadAdapter as error:
            outcome = EngineRequestError("invalid", str(error), "adapter")
        except MemoryError:
            outcome = EngineRequestError("resource", "no memory for the adapter", "adapter")
        except Exception as error:
            # A load that fails in an unforeseen way must still free its slot.
            log.exception("an adapter cannot be loaded", adapter_id=job.adapter_id)
            outcome = EngineRequestError("internal", f"{type(error).__name__}: {error}", "adapter")
        load_s = time.perf_counter() - started_s
        log.info("adapter read", adapter_id=job.adapter_id, load_s=round(load_s, 3))
        return LoadedAdapter(outcome, load_s)

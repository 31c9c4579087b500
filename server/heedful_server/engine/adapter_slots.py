"""Which adapter has which slot, and which requests still need it.

Owns the life of every adapter in the engine: loading, ready, leaving, gone. A slot belongs to one
adapter from the moment at which its load is accepted to the moment at which it is told that it is
free, and an adapter leaves only when no request has it. Knows nothing of files, tensors or threads;
pure Python, used by the engine child's main thread between steps.

    load ──> LOADING ──finish──> READY ──unload──> LEAVING ──last release──> gone
                │                  ^                  │
              unload               └──────load────────┘
                v
            ABANDONED ──finish──> gone          (load makes it LOADING again)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from heedful_server.errors import EngineRequestError
from heedful_server.protocol import (
    BASE_POLICY,
    AdapterLoaded,
    AdapterRole,
    AdapterUnloaded,
    Failed,
    FailureKind,
    LoadAdapter,
)

NO_SLOT: Final = -1
_NAMES: Final[dict[AdapterRole, str]] = {"policy": "policy", "reward": "reward model"}

AdapterReport = AdapterLoaded | AdapterUnloaded | Failed


class AdapterState(Enum):
    """Where an adapter is in its life."""

    LOADING = "loading"
    ABANDONED = "abandoned"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class LoadJob:
    """An adapter directory that is to be read into a slot."""

    adapter_id: str
    path: str
    role: AdapterRole
    slot: int


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """An adapter is in its slot."""

    num_bytes: int
    rank: int
    num_heads: int


@dataclass(slots=True)
class _Adapter:
    job: LoadJob
    state: AdapterState = AdapterState.LOADING
    outcome: LoadOutcome | None = None
    num_requests: int = 0
    waiting: list[str] = field(default_factory=list)
    """Ids of the load requests that wait for it."""


class AdapterSlots:
    """The table of slots; on_free is told of each slot whose contents nobody needs any more."""

    def __init__(self, num_slots: int, on_free: Callable[[int], None]) -> None:
        self.num_slots = num_slots
        self._on_free = on_free
        self._free = list(reversed(range(num_slots)))
        self._adapters: dict[str, _Adapter] = {}
        self._reports: list[AdapterReport] = []
        self._loads: dict[str, int] = {}
        self._load_s = 0.0

    @property
    def num_taken(self) -> int:
        """Slots that are not free."""
        return self.num_slots - len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters that are loaded."""
        outcomes = [adapter.outcome for adapter in self._adapters.values()]
        return sum(outcome.num_bytes for outcome in outcomes if outcome is not None)

    @property
    def requests(self) -> dict[str, int]:
        """Unfinished requests of each adapter that has a slot."""
        return {key: adapter.num_requests for key, adapter in self._adapters.items()}

    @property
    def loads(self) -> dict[str, int]:
        """Ended loads by outcome."""
        return dict(self._loads)

    @property
    def load_s(self) -> float:
        """Seconds that all loads took together."""
        return self._load_s

    def take_reports(self) -> list[AdapterReport]:
        """Return what has happened since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def load(self, message: LoadAdapter) -> LoadJob | None:
        """Take a request to load; return what the caller must read, if anything."""
        adapter = self._adapters.get(message.adapter_id)
        if adapter is None:
            return self._begin(message)
        if adapter.job.role != message.role:
            self._refuse(
                message.request_id, "invalid", f"it is loaded as a {_NAMES[adapter.job.role]}"
            )
        elif adapter.state in (AdapterState.LOADING, AdapterState.ABANDONED):
            adapter.state = AdapterState.LOADING
            adapter.waiting.append(message.request_id)
        else:
            adapter.state = AdapterState.READY
            self._report_loaded(adapter, message.request_id)
        return None

    def finish(
        self, adapter_id: str, outcome: LoadOutcome | EngineRequestError, load_s: float
    ) -> None:
        """Take the result of a job; the adapter serves from now on, unless it was abandoned."""
        adapter = self._adapters[adapter_id]
        self._load_s += load_s
        kind = "loaded" if isinstance(outcome, LoadOutcome) else outcome.kind
        self._loads[kind] = self._loads.get(kind, 0) + 1
        if isinstance(outcome, EngineRequestError):
            for request_id in adapter.waiting:
                self._reports.append(Failed(request_id, outcome.kind, str(outcome), outcome.field))
            self._remove(adapter)
            return
        if adapter.state is AdapterState.ABANDONED:
            self._remove(adapter)
            return
        adapter.state, adapter.outcome = AdapterState.READY, outcome
        for request_id in adapter.waiting:
            self._report_loaded(adapter, request_id)
        adapter.waiting.clear()

    def unload(self, adapter_id: str) -> None:
        """Take no more requests for an adapter, and let it go when the last one has ended."""
        adapter = self._adapters.get(adapter_id)
        if adapter is None:
            self._reports.append(AdapterUnloaded(adapter_id))
        elif adapter.state is AdapterState.LOADING:
            adapter.state = AdapterState.ABANDONED
            for request_id in adapter.waiting:
                self._refuse(request_id, "not_loaded", "the adapter was unloaded again")
            adapter.waiting.clear()
        elif adapter.state is AdapterState.READY:
            adapter.state = AdapterState.LEAVING
            self._leave_if_unused(adapter)

    def acquire(self, policy: str, role: AdapterRole, field_name: str) -> int:
        """Bind a request to an adapter until release(); return its slot, NO_SLOT for the base.

        Raises:
            EngineRequestError: it is not loaded, or is not of this role.
        """
        if policy == BASE_POLICY:
            return NO_SLOT
        adapter = self._adapters.get(policy)
        if adapter is None or adapter.state is not AdapterState.READY:
            raise EngineRequestError("not_loaded", "the adapter is not loaded", field_name)
        if adapter.job.role != role:
            reason = f"the adapter is a {_NAMES[adapter.job.role]}, not a {_NAMES[role]}"
            raise EngineRequestError("invalid", reason, field_name)
        adapter.num_requests += 1
        return adapter.job.slot

    def release(self, policy: str) -> None:
        """End a request's hold on an adapter."""
        if policy == BASE_POLICY:
            return
        adapter = self._adapters[policy]
        adapter.num_requests -= 1
        self._leave_if_unused(adapter)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is free or has one adapter."""
        taken = [adapter.job.slot for adapter in self._adapters.values()]
        assert sorted(taken + self._free) == list(range(self.num_slots)), (taken, self._free)
        for adapter in self._adapters.values():
            assert adapter.num_requests >= 0, adapter
            served = adapter.state in (AdapterState.READY, AdapterState.LEAVING)
            assert served or adapter.num_requests == 0, adapter
            assert adapter.num_requests or adapter.state is not AdapterState.LEAVING, adapter

    def _begin(self, message: LoadAdapter) -> LoadJob | None:
        if not self._free:
            reason = f"all {self.num_slots} adapter slots are taken"
            self._refuse(message.request_id, "resource", reason)
            return None
        job = LoadJob(message.adapter_id, message.path, message.role, self._free.pop())
        self._adapters[job.adapter_id] = _Adapter(job, waiting=[message.request_id])
        return job

    def _refuse(self, request_id: str, kind: FailureKind, reason: str) -> None:
        self._reports.append(Failed(request_id, kind, reason, "adapter"))

    def _report_loaded(self, adapter: _Adapter, request_id: str) -> None:
        outcome = adapter.outcome
        assert outcome is not None, "an adapter that serves has been loaded"
        self._reports.append(
            AdapterLoaded(
                request_id=request_id,
                adapter_id=adapter.job.adapter_id,
                num_bytes=outcome.num_bytes,
                rank=outcome.rank,
                num_heads=outcome.num_heads,
            )
        )

    def _leave_if_unused(self, adapter: _Adapter) -> None:
        if adapter.state is AdapterState.LEAVING and adapter.num_requests == 0:
            self._remove(adapter)

    def _remove(self, adapter: _Adapter) -> None:
        del self._adapters[adapter.job.adapter_id]
        self._on_free(adapter.job.slot)
        self._free.append(adapter.job.slot)
        # Also after a load that failed: somebody may have asked to unload it before.
        self._reports.append(AdapterUnloaded(adapter.job.adapter_id))

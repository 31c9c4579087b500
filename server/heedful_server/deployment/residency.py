"""Which adapters are in the engine's slots: loaded once, kept while needed, evicted when not.

Owns holds (a request's claim on its adapter), pins, eviction of the least recently used, and that
an adapter is verified before it is loaded and loaded once for all who wait. Which adapters matter
is told to it. Event loop; files are read in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable

import structlog
from heedful_store import StoreError, adapter_files

from heedful_server.deployment.served import ServedPolicy
from heedful_server.engine_client.client import EngineClient
from heedful_server.errors import (
    EngineRequestError,
    EngineUnavailable,
    PreconditionFailed,
    QueueFull,
)
from heedful_server.protocol import BASE_POLICY

log = structlog.get_logger(__name__)

_RETRY_S = 1.0
# Files that were found damaged are not read again for each request.
_REMEMBER_FAILURE_S = 2.0


class Hold:
    """A request's claim: its adapter is not evicted before the release."""

    __slots__ = ("_release", "policy")

    def __init__(self, policy: ServedPolicy, release: Callable[[], None]) -> None:
        self.policy = policy
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the claim up; again is harmless."""
        if self._release is not None:
            self._release()
            self._release = None


class Residency:
    """The adapters of one engine."""

    def __init__(
        self,
        engine: EngineClient,
        base_id: str,
        template_hash: str,
        max_adapters: int,
        load_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._base_id = base_id
        self._template_hash = template_hash
        self.max_adapters = max_adapters
        self._load_timeout_s = load_timeout_s
        self._clock = clock
        self._holds: Counter[str] = Counter()
        self._used_at_s: dict[str, float] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[float, Exception]] = {}
        self._hard: frozenset[str] = frozenset()
        self._soft: frozenset[str] = frozenset()
        self._making_room = asyncio.Lock()

    def is_loaded(self, policy: ServedPolicy) -> bool:
        """Say whether a request for this policy would be answered without a load."""
        return policy.adapter_id == BASE_POLICY or policy.adapter_id in self._engine.adapters

    @property
    def loaded_ids(self) -> frozenset[str]:
        """The adapters that take requests."""
        return frozenset(self._engine.adapters)

    def set_pins(self, hard: Iterable[str], soft: Iterable[str]) -> None:
        """Say which adapters are never evicted, and which only for others of their kind."""
        self._hard, self._soft = frozenset(hard), frozenset(soft)

    def hold(self, policy: ServedPolicy) -> Hold:
        """Keep an adapter from being evicted, be it loaded or about to be."""
        adapter_id = policy.adapter_id
        self._holds[adapter_id] += 1
        self._used_at_s[adapter_id] = self._clock()

        def release() -> None:
            self._holds[adapter_id] -= 1
            if not self._holds[adapter_id]:
                del self._holds[adapter_id]
            if self.is_loaded(policy):
                self._used_at_s[adapter_id] = self._clock()

        return Hold(policy, release)

    async def ensure(self, policy: ServedPolicy) -> None:
        """Return when the adapter is loaded; at once, without a switch of tasks, where it is.

        Raises:
            PreconditionFailed: its files are damaged, foreign or unusable.
            QueueFull: every slot is taken by adapters that are needed.
            EngineUnavailable: the engine does not serve, or the load takes too long.
        """
        while not self.is_loaded(policy):
            load = self._loads.get(policy.adapter_id)
            if load is None:
                load = asyncio.create_task(self._load(policy), name=f"load-{policy.version}")
                self._loads[policy.adapter_id] = load
                load.add_done_callback(lambda done: self._forget(policy.adapter_id, done))
            try:
                # The load is everybody's: one that leaves must not end it for the others.
                async with asyncio.timeout(self._load_timeout_s):
                    await asyncio.shield(load)
            except TimeoutError:
                raise EngineUnavailable(f"{policy.version} is still being loaded") from None

    async def verify(self, policy: ServedPolicy) -> None:
        """Read every byte of an adapter.

        Raises AdapterDamaged, ForeignAdapter.
        """
        assert policy.path is not None, "the base has no files of ours"
        await asyncio.to_thread(
            adapter_files.verify,
            policy.path,
            policy.content_hash,
            base_id=self._base_id,
            template_hash=self._template_hash,
        )

    async def unload(self, adapter_id: str) -> None:
        """Take no more requests for an adapter and wait until its slot is free."""
        self._used_at_s.pop(adapter_id, None)
        if adapter_id in self._engine.adapters:
            await self._engine.unload_adapter(adapter_id)

    def _forget(self, adapter_id: str, load: asyncio.Task[None]) -> None:
        del self._loads[adapter_id]
        if not load.cancelled():
            load.exception()  # retrieved here too, for there may be nobody left to raise it to

    async def _load(self, policy: ServedPolicy) -> None:
        self._raise_known_failure(policy.adapter_id)
        started_at_s = self._clock()
        try:
            await self.verify(policy)
            async with self._making_room:
                await self._make_room(policy)
                role = policy.role
                await self._engine.load_adapter(policy.adapter_id, str(policy.path), role)
        except StoreError as error:
            raise self._unusable(policy, str(error)) from error
        except EngineRequestError as error:
            if error.kind == "resource":
                raise QueueFull(str(error), _RETRY_S) from error
            raise self._unusable(policy, str(error)) from error
        self._used_at_s[policy.adapter_id] = self._clock()
        elapsed_s = round(self._clock() - started_at_s, 3)
        log.info("adapter loaded", version=policy.version, elapsed_s=elapsed_s)

    async def _make_room(self, policy: ServedPolicy) -> None:
        # What only somebody wants loaded never displaces what a project answers with.
        kept = self._hard if policy.adapter_id in self._soft else self._hard | self._soft
        while len(self._engine.adapters) >= self.max_adapters:
            idle = [
                name for name in self._engine.adapters if name not in kept and not self._holds[name]
            ]
            if not idle:
                raise QueueFull(
                    f"all {self.max_adapters} adapter slots (deployment.max_adapters) are needed",
                    _RETRY_S,
                )
            victim = min(idle, key=lambda name: (name in self._soft, self._used_at_s.get(name, 0)))
            log.info("adapter evicted", adapter_id=victim[:12])
            await self.unload(victim)

    def _unusable(self, policy: ServedPolicy, reason: str) -> PreconditionFailed:
        error = PreconditionFailed(f"{policy.version} cannot be loaded: {reason}")
        self._failures[policy.adapter_id] = (self._clock() + _REMEMBER_FAILURE_S, error)
        log.error("adapter cannot be loaded", version=policy.version, reason=reason)
        return error

    def _raise_known_failure(self, adapter_id: str) -> None:
        until_s, error = self._failures.get(adapter_id, (0.0, None))
        if error is not None and self._clock() < until_s:
            raise error
        self._failures.pop(adapter_id, None)

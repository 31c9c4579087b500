"""The server's own work on deployments: follow the registry, keep what is needed loaded, watch.

Owns what is done how often: following writes of other processes, loading champions and challengers
(also after an engine's restart), lapsed leases, probation, champions that are tainted for too long,
figures. Every step may fail and is tried again at the next turn. One task on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from heedful_store import Deployment, Scope, Store, StoreError, now_ms

from heedful_server.deployment import metrics as loop_metrics
from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.leases import Leases
from heedful_server.deployment.observing import Figures, Observations
from heedful_server.deployment.probation import ProbationLimits, harm
from heedful_server.deployment.promotion import Promotions
from heedful_server.deployment.residency import Residency
from heedful_server.deployment.served import ServedPolicy
from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import HeedfulServerError

log = structlog.get_logger(__name__)

_POLL_S = 0.4
_FIGURES_INTERVAL_S = 5.0
_RETRY_LOAD_S = 5.0


@dataclass(frozen=True, slots=True)
class KeeperSettings:
    """What is watched for how long."""

    probation_s: float
    limits: ProbationLimits
    taint_deadline_s: float
    canary: bool


class Keeper:
    """Keeps one server's deployments in order."""

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        directory: PolicyDirectory,
        residency: Residency,
        leases: Leases,
        promotions: Promotions,
        observations: Observations,
        metrics: loop_metrics.LoopMetrics,
        settings: KeeperSettings,
        wall_clock_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._store = store
        self._engine = engine
        self._directory = directory
        self._residency = residency
        self._leases = leases
        self._promotions = promotions
        self._observations = observations
        self._metrics = metrics
        self._settings = settings
        self._wall_clock_ms = wall_clock_ms
        self._wake = asyncio.Event()
        self._watched: dict[Scope, int] = {}  # the move whose figures are being gathered
        self._retry_at_s: dict[str, float] = {}
        self._figures_at_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Take the next turn at once: the engine is ready, or something has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self.turn()
            except StoreError as error:
                log.warning("deployments were not looked at", reason=str(error))
            except Exception:
                # A defect here must not end probation for good without a word.
                log.exception("the upkeep of deployments failed")
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._wake.wait()

    async def turn(self) -> None:
        """Do once what is due."""
        await self._directory.refresh()
        self.pin()
        self._lapse()
        self._load_needed()
        for scope in self._directory.scopes():
            await self._watch(scope)
            candidate = self._directory.next_challenger(scope) if self._settings.canary else None
            if candidate is not None:
                await self._promotions.challenge(scope, candidate)
        await self._count()

    def pin(self) -> None:
        """Say to the residency which adapters are needed now."""
        hard = {policy.adapter_id for policy in self._leases.policies()}
        soft = set()
        for scope in self._directory.scopes():
            soft |= {policy.adapter_id for policy in self._directory.answering(scope)}
            if (before := self._on_probation_after(scope)) is not None:
                hard.add(before.adapter_id)
        self._residency.set_pins(hard, soft)

    def _on_probation_after(self, scope: Scope) -> ServedPolicy | None:
        """Return the old champion while its successor is on probation."""
        move = self._directory.last_move(scope)
        if move is None or not self._is_on_probation(move):
            return None
        policy = self._directory.policy(scope, move.from_version or "")
        if policy is None or policy.base_id != self._directory.base_id:
            return None
        return self._directory.served(policy)

    def _is_on_probation(self, move: Deployment) -> bool:
        age_s = (self._wall_clock_ms() - move.at_ms) / 1000
        return move.action == "promote" and age_s < self._settings.probation_s

    def _lapse(self) -> None:
        for policy in self._leases.lapse():
            self.release_later(policy)

    async def release(self, policy: ServedPolicy) -> None:
        """Free the slot of an adapter whose lease ended, unless something else needs it."""
        self.pin()
        needed = {policy.adapter_id for policy in self._needed()}
        if policy.adapter_id not in needed:
            with contextlib.suppress(HeedfulServerError):
                await self._residency.unload(policy.adapter_id)

    def release_later(self, policy: ServedPolicy) -> None:
        """Free a slot as release does, without waiting for the requests that still use it."""
        task = asyncio.create_task(self.release(policy), name="release-adapter")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _needed(self) -> list[ServedPolicy]:
        """Return what should be loaded, the most urgent first, as far as there are slots."""
        scopes = self._directory.scopes()
        answering = [self._directory.answering(scope) for scope in scopes]
        wanted = [found[0] for found in answering if found]
        wanted += [policy for found in answering for policy in found[1:]]
        wanted += self._leases.policies()
        wanted += [p for scope in scopes if (p := self._on_probation_after(scope)) is not None]
        wanted += [p for scope in scopes if (p := self._directory.reward_model(scope)) is not None]
        unique = {policy.adapter_id: policy for policy in wanted}
        return list(unique.values())[: self._residency.max_adapters]

    def _load_needed(self) -> None:
        """Begin the loads that are due; a failed one is tried again after a pause."""
        if self._engine.state is not EngineState.READY:
            return
        now_s = time.monotonic()
        for policy in self._needed():
            is_due = now_s >= self._retry_at_s.get(policy.adapter_id, 0.0)
            if is_due and not self._residency.is_loaded(policy):
                self._retry_at_s[policy.adapter_id] = now_s + _RETRY_LOAD_S
                load = asyncio.create_task(self._load(policy), name=f"keep-{policy.version}")
                self._tasks.add(load)
                load.add_done_callback(self._tasks.discard)

    async def _load(self, policy: ServedPolicy) -> None:
        try:
            await self._residency.ensure(policy)
        except HeedfulServerError as error:
            self._metrics.load_failures.inc()
            log.warning("an adapter is not loaded", version=policy.version, reason=str(error))
        else:
            self._retry_at_s.pop(policy.adapter_id, None)

    async def _watch(self, scope: Scope) -> None:
        """Take a champion back that is tainted for too long, or does harm on probation."""
        champion = self._directory.champion(scope)
        policy = self._directory.policy(scope, champion)
        if policy is None:
            return
        if policy.tainted_at_ms is not None:
            age_s = (self._wall_clock_ms() - policy.tainted_at_ms) / 1000
            if age_s >= self._settings.taint_deadline_s:
                reason = (
                    "it has learned from data that was erased, and no rebuild replaced it "
                    f"within {self._settings.taint_deadline_s:g} s"
                )
                await self._take_back(scope, champion, "tainted", reason, {})
            return
        move = self._directory.last_move(scope)
        if move is not None and move.to_version == champion and self._is_on_probation(move):
            await self._judge(scope, move)

    async def _judge(self, scope: Scope, move: Deployment) -> None:
        if self._watched.get(scope) != move.deployment_id:
            # What it did as a challenger, or before a roll-back, says nothing of it as champion.
            self._watched[scope] = move.deployment_id
            self._observations.restart(scope, move.to_version)
        old = Figures.from_json(move.evidence.get("before"))
        new = self._observations.of(scope, move.to_version).figures()
        reason = harm(old, new, self._settings.limits)
        if reason:
            known: dict[str, object] = {"before": old.to_json(), "after": new.to_json()}
            await self._take_back(scope, move.to_version, "probation", reason, known)

    async def _take_back(
        self, scope: Scope, version: str, cause: str, reason: str, known: dict[str, object]
    ) -> None:
        try:
            await self._promotions.roll_back(
                scope, f"{version}: {reason}", cause, only_from=version, known=known
            )
        except HeedfulServerError as error:
            log.error("a champion could not be taken back", version=version, reason=str(error))
        else:
            self._metrics.automatic_roll_backs.labels(cause).inc()

    async def _count(self) -> None:
        self._metrics.leases.set(len(self._leases.policies()))
        self._metrics.versions = {
            name: self._directory.version_of(name) for name in self._residency.loaded_ids
        }
        if time.monotonic() < self._figures_at_s:
            return
        self._figures_at_s = time.monotonic() + _FIGURES_INTERVAL_S
        self._metrics.figures = await asyncio.to_thread(
            loop_metrics.read, self._store, self._directory
        )

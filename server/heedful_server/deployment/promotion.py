"""Moving the champion alias: forward, back, and away from a version that must not serve any longer.

Owns the order of a promotion: refuse, verify the files, load, one transaction in the store, then
the directory follows, so that a crash at any point leaves exactly one champion, and what it names
is loaded. Moves of one project take turns. Event loop.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

import structlog
from heedful_store import (
    BASE_VERSION,
    AdapterDamaged,
    Deployment,
    ForeignAdapter,
    NotFound,
    PolicyVersion,
    Run,
    Scope,
    Store,
)
from heedful_store.failpoints import Failpoints

from heedful_server.deployment import evidence
from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.observing import Observations
from heedful_server.deployment.residency import Residency
from heedful_server.deployment.served import BASE, CHALLENGER, CHAMPION, ServedPolicy
from heedful_server.deployment.votes import count_votes
from heedful_server.errors import EngineUnavailable, PreconditionFailed

log = structlog.get_logger(__name__)


class Promotions:
    """Promotes and rolls back."""

    def __init__(
        self,
        store: Store,
        directory: PolicyDirectory,
        residency: Residency,
        observations: Observations,
        *,
        is_shadow: bool,
    ) -> None:
        self._store = store
        self._directory = directory
        self._residency = residency
        self._observations = observations
        self._is_shadow = is_shadow
        self._turns: defaultdict[Scope, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failpoints = Failpoints.from_environment()

    async def promote(self, scope: Scope, version: str, reason: str, actor: str) -> Deployment:
        """Make a version champion.

        Raises:
            NotFound: there is no such version.
            PreconditionFailed: it may not be promoted, or its files are not what was published.
            StoreError: the move could not be recorded; the champion stays.
        """
        if self._is_shadow:
            raise PreconditionFailed("deployment.mode is shadow: nothing is promoted")
        async with self._turns[scope]:
            await self._directory.refresh()
            champion = self._directory.champion(scope)
            if version == champion:
                raise PreconditionFailed(f"{version} is champion already")
            target, proven, known = await self._admit(scope, version)
            await self._load(target)
            self._failpoints.hit("before_alias_move")
            old = self._observations.of(scope, champion).figures()
            moved = await self._store.move_alias(
                scope,
                self._directory.base_id,
                CHAMPION,
                version,
                action="promote",
                actor=actor,
                approved=not proven,
                verdict="proven" if proven else "approved",
                reason=reason,
                evidence={**known, "before": old.to_json()},
                expected_version=champion,
            )
            return await self._follow(moved)

    async def roll_back(
        self,
        scope: Scope,
        reason: str,
        actor: str,
        *,
        only_from: str | None = None,
        known: Mapping[str, object] | None = None,
    ) -> Deployment:
        """Make the newest sound champion before this one champion again.

        With `only_from` that version has to be champion still; `known` is the evidence. Raises
        PreconditionFailed where there is nothing to go back to, StoreError where the move could not
        be recorded.
        """
        async with self._turns[scope]:
            await self._directory.refresh()
            champion = self._directory.champion(scope)
            if champion == BASE_VERSION or only_from not in (None, champion):
                raise PreconditionFailed(f"{champion} is champion; there is nothing to go back to")
            version = await self._loaded_before(scope)
            moved = await self._store.move_alias(
                scope,
                self._directory.base_id,
                CHAMPION,
                version,
                action="roll_back",
                actor=actor,
                verdict="rolled back",
                reason=reason,
                evidence=known,
                expected_version=champion,
            )
            return await self._follow(moved)

    async def challenge(self, scope: Scope, policy: PolicyVersion) -> Deployment:
        """Make a version the challenger, instead of the one there is.

        Raises StoreError where that could not be recorded, or another server was faster.
        """
        async with self._turns[scope]:
            moved = await self._store.move_alias(
                scope,
                self._directory.base_id,
                CHALLENGER,
                policy.version,
                action="canary",
                actor="server",
                verdict=policy.verdict,
                reason="the newest version that did not fail the gate",
                expected_version=self._directory.alias(scope, CHALLENGER),
            )
            await self._directory.refresh()
        log.info("challenger", project=scope.project, version=policy.version)
        return moved

    async def known_about(
        self, scope: Scope, policy: PolicyVersion
    ) -> tuple[evidence.Json, Run | None]:
        """Return the gate's report on a version, and the run that made it."""
        run = None
        if policy.run_id is not None:
            try:
                run = await asyncio.to_thread(self._store.get_run, scope, policy.run_id)
            except NotFound:
                run = None
        return evidence.gate_report(policy, run), run

    async def _admit(
        self, scope: Scope, version: str
    ) -> tuple[ServedPolicy, bool, dict[str, object]]:
        """Return what to load, whether it is proven, and the evidence; refuse what may not be."""
        if version == BASE_VERSION:
            return BASE, False, {}
        policy = await asyncio.to_thread(self._store.get_policy, scope, version)
        target = self._directory.served(policy)
        report, _ = await self.known_about(scope, policy)
        if why := evidence.refusal(policy, report):
            raise PreconditionFailed(why)
        champion = self._directory.champion(scope)
        votes = await asyncio.to_thread(count_votes, self._store, scope, version, champion)
        known: dict[str, object] = {
            "gate": evidence.summary(policy, report),
            "votes": votes.to_json(),
        }
        return target, evidence.is_proven(policy), known

    async def _load(self, target: ServedPolicy) -> None:
        """Verify and load; a loaded one is verified too, for its files must outlive a restart."""
        if target.path is None:
            return
        await self._residency.verify(target)
        await self._residency.ensure(target)

    async def _load_if_served(self, target: ServedPolicy) -> None:
        """Load what a roll-back goes to; a dead engine must not keep the alias where it is."""
        try:
            await self._residency.ensure(target)
        except EngineUnavailable:
            await self._residency.verify(target)

    async def _loaded_before(self, scope: Scope) -> str:
        """Return what to go back to, loaded; what turns out to be damaged is passed over."""
        while True:
            base_id = self._directory.base_id
            version = await asyncio.to_thread(self._store.champion_before, scope, base_id)
            if version == BASE_VERSION:
                return version
            policy = await asyncio.to_thread(self._store.get_policy, scope, version)
            try:
                await self._load_if_served(self._directory.served(policy))
            except (PreconditionFailed, AdapterDamaged, ForeignAdapter) as error:
                log.error("a roll-back passes over a version", version=version, reason=str(error))
                await self._store.set_policy_state(scope, version, "failed")
            else:
                return version

    async def _follow(self, moved: Deployment) -> Deployment:
        self._observations.restart(moved.scope, moved.to_version)
        await self._directory.refresh()
        log.info(
            "champion moved",
            action=moved.action,
            project=moved.scope.project,
            from_version=moved.from_version,
            to_version=moved.to_version,
            reason=moved.reason,
            actor=moved.actor,
        )
        return moved

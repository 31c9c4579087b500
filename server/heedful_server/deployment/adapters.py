"""Loading and unloading on request: published versions, and adapters of runs that are leased.

Owns what LoadAdapter and UnloadAdapter do once their request is known to be valid. Event loop.
"""

from __future__ import annotations

import asyncio

from heedful_store import Scope, Store

from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.keeper import Keeper
from heedful_server.deployment.leases import Leases
from heedful_server.deployment.residency import Residency
from heedful_server.deployment.served import BASE, RunAdapterName, ServedPolicy
from heedful_server.errors import ModelNotLoaded, NotFound


class AdapterDesk:
    """Loads and frees adapters for those who ask for them."""

    def __init__(
        self,
        store: Store,
        directory: PolicyDirectory,
        residency: Residency,
        leases: Leases,
        keeper: Keeper,
    ) -> None:
        self._store = store
        self._directory = directory
        self._residency = residency
        self._leases = leases
        self._keeper = keeper

    async def load_version(self, scope: Scope, version: str, lease_s: float) -> ServedPolicy:
        """Load a published version and keep it; raises NotFound and as Residency.ensure does."""
        try:
            policy = self._directory.resolve(scope, version)
        except NotFound:
            await self._directory.refresh()
            policy = self._directory.resolve(scope, version)
        if policy == BASE:
            return policy
        await self._load(scope, policy.version, policy, lease_s)
        return policy

    async def load_run_adapter(self, wanted: RunAdapterName, lease_s: float) -> ServedPolicy:
        """Load an adapter of a run, or what its name means now, and keep it for the lease.

        Raises:
            NotFound: this project has no such run, or the run no such adapter.
            AdapterDamaged, ForeignAdapter, HeedfulServerError: it cannot be loaded.
        """
        await asyncio.to_thread(self._store.get_run, wanted.scope, wanted.run_id)
        policy = await self._leases.read(wanted)
        await self._load(wanted.scope, wanted.model, policy, lease_s)
        return policy

    async def unload(self, scope: Scope, name: str) -> None:
        """End the lease of a name and free the slot, unless the project itself needs the adapter.

        Raises:
            NotFound: there is no such version.
            ModelNotLoaded: there is, and nobody had it loaded.
        """
        policy = self._leases.drop(scope, name)
        if policy is None:
            policy = self._directory.resolve(scope, name)
            if policy == BASE or not self._residency.is_loaded(policy):
                raise ModelNotLoaded(f"{name} is not loaded")
        await self._keeper.release(policy)

    async def _load(self, scope: Scope, name: str, policy: ServedPolicy, lease_s: float) -> None:
        hold = self._residency.hold(policy)
        try:
            await self._residency.ensure(policy)
            before = self._leases.put(scope, name, policy, lease_s)
            self._keeper.pin()
        finally:
            hold.release()
        if before is not None and not self._leases.is_leased(before.adapter_id):
            # Running requests keep the files that the name meant when they came.
            self._keeper.release_later(before)

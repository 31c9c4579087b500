"""The way of a request to its policy: resolve the name, claim the adapter, wait until it is loaded.

Owns the rule who may ask for what, and which policies the server loads by itself: champion,
challenger and reward model of a project. Others have to be loaded by LoadAdapter first. Event loop.
"""

from __future__ import annotations

from heedful_store import Scope

from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.leases import Leases
from heedful_server.deployment.residency import Hold, Residency
from heedful_server.deployment.served import BASE, RUN_PREFIX, ServedPolicy, run_adapter
from heedful_server.errors import InvalidRequest, ModelNotLoaded, NotFound, PreconditionFailed
from heedful_server.identity import TRAIN, Caller


class PolicyDoor:
    """Binds requests to policies."""

    def __init__(self, directory: PolicyDirectory, residency: Residency, leases: Leases) -> None:
        self.directory = directory
        self.residency = residency
        self.leases = leases

    async def enter(self, who: Caller, scope: Scope, model: str) -> Hold:
        """Claim the policy that a name means now; `ready` has to follow before it is used.

        Raises:
            NotFound, PermissionDenied: there is no such model for this caller.
            ModelNotLoaded: it is there and not loaded, and not one that is loaded by itself.
            InvalidRequest: it is a reward model, which generates nothing.
        """
        policy = await self._find(who, scope, model)
        if policy.role == "reward":
            raise InvalidRequest("model", f"{policy.version} is a reward model")
        return self._hold(scope, policy)

    async def enter_reward(self, scope: Scope) -> Hold:
        """Claim the newest reward model of a project; raises PreconditionFailed without one."""
        policy = self.directory.reward_model(scope)
        if policy is None and await self.directory.refresh():
            policy = self.directory.reward_model(scope)
        if policy is None:
            raise PreconditionFailed("this project has no reward model for the base it serves yet")
        return self._hold(scope, policy)

    async def ready(self, hold: Hold) -> None:
        """Wait until a claimed policy can be used; raises as Residency.ensure does.

        Where the adapter was loaded already no other task runs meanwhile, so that a request that
        is submitted right after it finds the adapter there.
        """
        await self.residency.ensure(hold.policy)

    async def version(self, who: Caller, scope: Scope, model: str) -> str:
        """Return which version a name means now; it need not be loaded. Raises as enter does."""
        return (await self._find(who, scope, model)).version

    def _hold(self, scope: Scope, policy: ServedPolicy) -> Hold:
        if not self.residency.is_loaded(policy):
            self._require_loadable(scope, policy)
        return self.residency.hold(policy)

    async def _find(self, who: Caller, scope: Scope, model: str) -> ServedPolicy:
        if model.startswith(RUN_PREFIX):
            who.require(TRAIN)
            wanted = run_adapter(scope, model)
            if wanted is None:
                raise NotFound(f"no model {model[:80]!r} (field model)")
            return self.leases.get(scope, wanted.model)
        try:
            return self.directory.resolve(scope, model)
        except NotFound:
            # It may have been published a moment ago, by another process.
            if not await self.directory.refresh():
                raise
        return self.directory.resolve(scope, model)

    def _require_loadable(self, scope: Scope, policy: ServedPolicy) -> None:
        own = [BASE, *self.directory.answering(scope), self.directory.reward_model(scope)]
        is_leased = self.leases.is_leased(policy.adapter_id)
        if not is_leased and all(
            other is None or other.adapter_id != policy.adapter_id for other in own
        ):
            raise ModelNotLoaded(
                f"{policy.version} is not loaded; LoadAdapter loads it (field model)"
            )

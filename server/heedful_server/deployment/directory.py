"""The registry as the server sees it: which versions there are and where the aliases point.

Owns one snapshot of the store's registry, replaced as a whole when its mark has changed: after a
write of this process at once, after one of another process within the polling interval. Looking up
a model costs no query. It does not know what is loaded. Event loop; the store is read in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from heedful_store import BASE_VERSION, Deployment, PolicyVersion, Scope, Store

from heedful_server.deployment.served import BASE, CHALLENGER, CHAMPION, ServedPolicy
from heedful_server.errors import NotFound, PreconditionFailed
from heedful_server.protocol import AdapterRole

_UNSOUND = ("rejected", "failed")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The registry at one instant."""

    policies: Mapping[Scope, Mapping[str, PolicyVersion]] = field(default_factory=dict)
    aliases: Mapping[Scope, Mapping[str, str]] = field(default_factory=dict)
    moves: Mapping[Scope, Deployment] = field(default_factory=dict)  # the champion's last one


class PolicyDirectory:
    """Resolves names of models."""

    def __init__(self, store: Store, home: Path, base_id: str, template_hash: str) -> None:
        """Args: base_id and template_hash are what is served; other versions are foreign."""
        self.base_id = base_id
        self.template_hash = template_hash
        self._store = store
        self._home = home
        self._mark: tuple[int, int] | None = None
        self._snapshot = _Snapshot()
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()

    async def refresh(self) -> bool:
        """Read the registry again if it has changed; return whether it had. Raises StoreError."""
        async with self._lock:
            mark = await asyncio.to_thread(self._store.registry_mark)
            if mark == self._mark:
                return False
            self._snapshot = await asyncio.to_thread(self._read)
            self._mark = mark
        self._changed.set()
        self._changed = asyncio.Event()
        return True

    async def wait_change(self, timeout_s: float) -> None:
        """Wait until the registry has changed, or for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def scopes(self) -> list[Scope]:
        """Return the projects that have versions."""
        return list(self._snapshot.policies)

    def alias(self, scope: Scope, name: str) -> str | None:
        """Return where an alias points; a champion always does."""
        default = BASE_VERSION if name == CHAMPION else None
        return self._snapshot.aliases.get(scope, {}).get(name, default)

    def aliases(self, scope: Scope) -> dict[str, str]:
        """Return where the aliases of a project point."""
        return {CHAMPION: BASE_VERSION, **self._snapshot.aliases.get(scope, {})}

    def champion(self, scope: Scope) -> str:
        """Return the version that answers by default."""
        return self.aliases(scope)[CHAMPION]

    def last_move(self, scope: Scope) -> Deployment | None:
        """Return the deployment that made the champion what it is."""
        return self._snapshot.moves.get(scope)

    def policy(self, scope: Scope, version: str) -> PolicyVersion | None:
        """Return a version's row; None for the base and for what is not there."""
        return self._snapshot.policies.get(scope, {}).get(version)

    def policies(self, scope: Scope) -> list[PolicyVersion]:
        """Return the versions of a project, newest first."""
        return list(self._snapshot.policies.get(scope, {}).values())

    def resolve(self, scope: Scope, name: str) -> ServedPolicy:
        """Return what a request for an alias or a version is bound to.

        Raises:
            NotFound: there is no such version here.
            PreconditionFailed: it belongs to another base model.
        """
        version: str | None = name or CHAMPION
        if version in (CHAMPION, CHALLENGER):
            version = self.alias(scope, name or CHAMPION)
        if version == BASE_VERSION:
            return BASE
        policy = self.policy(scope, version) if version is not None else None
        if policy is None:
            raise NotFound(f"no model {name[:80]!r} (field model); {self._there_is(scope)}")
        return self.served(policy)

    def served(self, policy: PolicyVersion) -> ServedPolicy:
        """Return what serves a version; raises PreconditionFailed for another base's."""
        if policy.base_id != self.base_id:
            raise PreconditionFailed(
                f"{policy.version} belongs to the base {policy.base_id!r}, "
                f"and this server serves {self.base_id!r}"
            )
        role: AdapterRole = "reward" if policy.role == "reward" else "policy"
        path = self._home / policy.path
        return ServedPolicy(policy.version, policy.content_hash, path, role)

    def reward_model(self, scope: Scope) -> ServedPolicy | None:
        """Return the newest sound reward model of a project on this base."""
        for policy in self.policies(scope):
            is_sound = policy.state not in _UNSOUND and policy.tainted_at_ms is None
            if policy.role == "reward" and policy.base_id == self.base_id and is_sound:
                return self.served(policy)
        return None

    def answering(self, scope: Scope) -> list[ServedPolicy]:
        """Return champion and challenger, as far as they are adapters."""
        found = []
        for name in (CHAMPION, CHALLENGER):
            version = self.alias(scope, name)
            policy = self.policy(scope, version) if version is not None else None
            if policy is not None and policy.base_id == self.base_id:
                found.append(self.served(policy))
        return found

    def next_challenger(self, scope: Scope) -> PolicyVersion | None:
        """Return the newest judged candidate that is newer than champion and challenger, if any.

        One that a promotion or a roll-back passed over does not rise any more.
        """
        move = self.last_move(scope)
        since_ms = move.at_ms if move is not None else 0
        if (now := self.policy(scope, self.alias(scope, CHALLENGER) or "")) is not None:
            since_ms = max(since_ms, now.created_at_ms)
        for policy in self.policies(scope):
            is_judged = policy.verdict not in ("", "fail") and policy.tainted_at_ms is None
            is_ours = policy.role == "policy" and policy.base_id == self.base_id
            if policy.state == "candidate" and is_judged and is_ours:
                return policy if policy.created_at_ms > since_ms else None
        return None

    def version_of(self, adapter_id: str) -> str:
        """Return a name for an adapter, for people; empty for one that is not in the registry."""
        for versions in self._snapshot.policies.values():
            for policy in versions.values():
                if policy.content_hash == adapter_id:
                    return policy.version
        return ""

    def _there_is(self, scope: Scope) -> str:
        versions = [BASE_VERSION, *(policy.version for policy in self.policies(scope))]
        shown = ", ".join(repr(version) for version in versions[:8])
        names = ", ".join(f"{alias} {at!r}" for alias, at in self.aliases(scope).items())
        return f"this project has {shown} ({names})"

    def _read(self) -> _Snapshot:
        found, aliases = self._store.registry(self.base_id)
        policies: dict[Scope, dict[str, PolicyVersion]] = {}
        for policy in found:
            policies.setdefault(policy.scope, {})[policy.version] = policy
        moves = {}
        for scope in policies:
            move = self._store.last_move(scope, self.base_id, CHAMPION)
            if move is not None:
                moves[scope] = move
        return _Snapshot(policies, aliases, moves)

"""Adapters of runs that are not published: leased, confined to the run's directory, freed in time.

Owns the table of what is leased under which name, ephemeral adapters and published versions alike.
A name can come to mean other files, as a trainer's candidate does after each of its steps. It
loads nothing itself. Event loop; files are read in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heedful_store import Scope, adapter_files

from heedful_server.deployment.served import RunAdapterName, ServedPolicy
from heedful_server.errors import ModelNotLoaded, NotFound
from heedful_server.protocol import AdapterRole

_Key = tuple[Scope, str]


@dataclass(frozen=True, slots=True)
class Lease:
    """An adapter that is to stay loaded."""

    policy: ServedPolicy
    until_s: float | None  # None: until it is unloaded


class Leases:
    """What was loaded on request, by project and name."""

    def __init__(
        self,
        home: Path,
        base_id: str,
        template_hash: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs = home / "runs"
        self._base_id = base_id
        self._template_hash = template_hash
        self._clock = clock
        self._leases: dict[_Key, Lease] = {}

    def put(
        self, scope: Scope, name: str, policy: ServedPolicy, lease_s: float
    ) -> ServedPolicy | None:
        """Lease an adapter under a name, 0 for good; return another one that the name had."""
        before = self._leases.get((scope, name))
        until_s = self._clock() + lease_s if lease_s else None
        self._leases[(scope, name)] = Lease(policy, until_s)
        if before is None or before.policy.adapter_id == policy.adapter_id:
            return None
        return before.policy

    def get(self, scope: Scope, name: str) -> ServedPolicy:
        """Return what a name of a run's adapter means; raises ModelNotLoaded where it lapsed."""
        lease = self._leases.get((scope, name))
        if lease is None:
            raise ModelNotLoaded(f"{name} is not loaded, or its lease has lapsed")
        return lease.policy

    def drop(self, scope: Scope, name: str) -> ServedPolicy | None:
        """End a lease; return what was leased."""
        lease = self._leases.pop((scope, name), None)
        return None if lease is None else lease.policy

    def lapse(self) -> list[ServedPolicy]:
        """End the leases whose time is over; return what was leased."""
        now_s = self._clock()
        over = [
            key
            for key, lease in self._leases.items()
            if lease.until_s is not None and lease.until_s <= now_s
        ]
        return [self._leases.pop(key).policy for key in over]

    def policies(self) -> list[ServedPolicy]:
        """Return everything that is leased."""
        return [lease.policy for lease in self._leases.values()]

    def is_leased(self, adapter_id: str) -> bool:
        """Say whether an adapter is leased under any name."""
        return any(policy.adapter_id == adapter_id for policy in self.policies())

    async def read(self, wanted: RunAdapterName) -> ServedPolicy:
        """Return an adapter of a run's directory, whole.

        Raises:
            NotFound: there is no such directory below the run's.
            AdapterDamaged, ForeignAdapter: what is there cannot be served.
        """
        return await asyncio.to_thread(self._read, wanted)

    def _read(self, wanted: RunAdapterName) -> ServedPolicy:
        path = self._runs / wanted.run_id / "adapters" / wanted.name
        # A link could lead anywhere, so the place that counts is the one behind all links.
        if not path.is_dir() or not path.resolve().is_relative_to(self._runs.resolve()):
            raise NotFound(f"run {wanted.run_id} has no adapter {wanted.name!r}")
        found = adapter_files.verify(path, base_id=self._base_id, template_hash=self._template_hash)
        role: AdapterRole = "reward" if found.info.role == "reward" else "policy"
        return ServedPolicy(wanted.model, found.content_hash, path, role)

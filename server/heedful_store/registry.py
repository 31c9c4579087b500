"""The store's part on training and deployment: policy versions, aliases, refresh runs.

Owns the list of what can be asked of the registry; rules and SQL are in ``policies``,
``deployments`` and ``runs``. Threads as ``store`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from heedful_store import deployments, policies, runs
from heedful_store.ack import Ack
from heedful_store.deployments import ANY, Action, Alias, AnyVersion, Deployment
from heedful_store.opened import OpenedStore
from heedful_store.policies import PolicyState, PolicyVersion, Role
from heedful_store.records import Scope
from heedful_store.runs import Control, Run, RunChanges, RunInput


class RegistryStore(OpenedStore):
    """An open store, as training and deployment see it."""

    # Policy versions

    def publish_policy(self, policy: PolicyVersion) -> Ack[PolicyVersion]:
        """Store a version with its "publish" deployment; retries are safe. See policies.publish.

        Raises Invalid at once; AlreadyExists comes out of the Ack.
        """
        policies.check(policy)
        return self.write(lambda c: policies.publish(c, policy, self._clock()))

    def next_version(self, scope: Scope, role: Role = "policy") -> str:
        """Return the name that the next version of a role would get."""
        with self.read() as connection:
            return policies.next_version(connection, scope, role)

    def get_policy(self, scope: Scope, version: str) -> PolicyVersion:
        """Return a version; raise NotFound, also for "base", which has no row."""
        with self.read() as connection:
            return policies.get(connection, scope, version)

    def find_policies(self, scope: Scope | None = None) -> list[PolicyVersion]:
        """Return the versions of a project, or of all projects, newest first."""
        with self.read() as connection:
            return policies.find(connection, scope)

    def set_policy_state(
        self,
        scope: Scope,
        version: str,
        state: PolicyState,
        *,
        card: Mapping[str, object] | None = None,
        verdict: str | None = None,
    ) -> Ack[PolicyVersion]:
        """Change where a version stands and, if given, its card and verdict. Raises NotFound."""
        return self.write(lambda c: policies.set_state(c, scope, version, state, card, verdict))

    # Aliases and deployments

    def move_alias(
        self,
        scope: Scope,
        base_id: str,
        alias: Alias,
        version: str | None,
        *,
        action: Action,
        actor: str,
        approved: bool = False,
        verdict: str = "",
        reason: str = "",
        evidence: Mapping[str, object] | None = None,
        expected_version: str | AnyVersion | None = ANY,
    ) -> Ack[Deployment]:
        """Point an alias at a version, "base" or nothing, and log it: one transaction.

        Raises NotFound, and AliasMoved where the alias is not at ``expected_version``.
        """
        wanted = Deployment(
            scope=scope,
            base_id=base_id,
            action=action,
            to_version=version or "",
            alias=alias,
            actor=actor,
            approved=approved,
            verdict=verdict,
            reason=reason,
            evidence=evidence or {},
            at_ms=self._clock(),
        )
        return self.write(lambda c: deployments.move(c, wanted, expected_version))

    def record_deployment(self, deployment: Deployment) -> Ack[Deployment]:
        """Log a deployment that moves no alias; ``publish_policy`` logs its own."""
        return self.write(lambda c: deployments.append(c, deployment))

    def aliases(self, scope: Scope, base_id: str) -> dict[str, str]:
        """Return where a project's aliases point; a missing champion is the base."""
        with self.read() as connection:
            return deployments.current(connection, scope, base_id)

    def deployments(self, scope: Scope, after_id: int = 0, limit: int = 100) -> list[Deployment]:
        """Return a page of a project's log; the last one's id is the next ``after_id``."""
        with self.read() as connection:
            return deployments.find(connection, scope, after_id, limit)

    def last_move(self, scope: Scope, base_id: str, alias: Alias) -> Deployment | None:
        """Return the newest move of an alias, or None where it never moved."""
        with self.read() as connection:
            return deployments.last_move(connection, scope, base_id, alias)

    def last_deployment_id(self) -> int:
        """Return the id of the newest deployment of all projects; 0 where there is none."""
        with self.read() as connection:
            return deployments.last_id(connection)

    def registry_mark(self) -> tuple[int, int]:
        """Return what changes whenever a deployment is logged or a policy is tainted."""
        with self.read() as connection:
            return deployments.change_mark(connection)

    def registry(self, base_id: str) -> tuple[list[PolicyVersion], dict[Scope, dict[str, str]]]:
        """Return all versions, newest first, and all aliases of a base, at one instant."""
        with self.read() as connection:
            return policies.find(connection, None), deployments.all_aliases(connection, base_id)

    def champion_before(self, scope: Scope, base_id: str) -> str:
        """Return what a roll-back goes to; see deployments.champion_before."""
        with self.read() as connection:
            return deployments.champion_before(connection, scope, base_id)

    # Runs

    def create_run(self, run: Run) -> Ack[Run]:
        """Queue a run. Raises AlreadyExists while another one of the project is not finished."""
        return self.write(lambda c: runs.create(c, run, self._clock()))

    def get_run(self, scope: Scope, run_id: str) -> Run:
        """Return a run; raise NotFound for an unknown or foreign one."""
        with self.read() as connection:
            return runs.get(connection, scope, run_id)

    def find_runs(self, scope: Scope | None = None, limit: int = 20) -> list[Run]:
        """Return the runs of a project, or of all, newest first."""
        with self.read() as connection:
            return runs.find(connection, scope, limit)

    def run_inputs(self, run_id: str) -> list[RunInput]:
        """Return which events a run read, in order of the log."""
        with self.read() as connection:
            return runs.inputs(connection, run_id)

    def lease_run(self, owner: str, lease_ms: int, scope: Scope | None = None) -> Ack[Run | None]:
        """Take the oldest run that nobody works on, or get None. Raises Invalid."""
        return self.write(lambda c: runs.lease(c, owner, lease_ms, self._clock(), scope))

    def renew_run(self, run_id: str, owner: str, lease_ms: int) -> Ack[Run]:
        """Keep a run; its ``control`` says what is asked of the worker. Raises LeaseLost."""
        return self.write(lambda c: runs.renew(c, run_id, owner, lease_ms, self._clock()))

    def update_run(self, run_id: str, owner: str, **changes: Unpack[RunChanges]) -> Ack[Run]:
        """Change a run that ``owner`` holds; evidence is merged by stage. Raises LeaseLost.

        Any status but "running" and "paused" gives the run out of hand.
        """
        return self.write(lambda c: runs.change(c, run_id, owner, changes, self._clock()))

    def control_run(self, scope: Scope, run_id: str, control: Control) -> Ack[Run]:
        """Ask a run to pause, to stop or ("") to go on. Raises NotFound, Invalid once it ended."""
        return self.write(lambda c: runs.control(c, scope, run_id, control, self._clock()))

    def put_run_inputs(self, run_id: str, owner: str, rows: Sequence[RunInput]) -> Ack[int]:
        """Record exactly which events a run read, replacing what was there. Raises LeaseLost."""
        return self.write(lambda c: runs.put_inputs(c, run_id, owner, rows))

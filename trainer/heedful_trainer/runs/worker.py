"""A worker: takes runs from the store, one after another, until it is told to end.

Owns the wait for work. What a run does, and how it ends, is ``machine``'s matter. Main thread; a
signal handler may call ``end``.
"""

from __future__ import annotations

import os
import socket
import threading

import structlog
from heedful_store import Failpoints, NotFound, Run, Scope, Store, StoreError

from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place
from heedful_trainer.errors import LeaseLost
from heedful_trainer.runs import machine
from heedful_trainer.runs.triggers import Triggers

_IDLE_S = 1.0


class Worker:
    """Works on runs of every project of a store."""

    def __init__(
        self, store: Store, place: Place, config: TrainerConfig, failpoints: Failpoints
    ) -> None:
        self._store, self._place, self._config = store, place, config
        self._failpoints = failpoints
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._ended = threading.Event()

    def end(self) -> None:
        """Take no more runs."""
        self._ended.set()

    def work(self, *, once: bool, triggers: Triggers | None = None) -> Run | None:
        """Work on runs as they come; with ``once``, on one at most, and return it."""
        while not self._ended.is_set():
            if triggers is not None:
                self._look(triggers)
            run = self._next()
            if run is not None:
                done = self._work_on(run)
                if once:
                    return done
            elif once:
                return None
            else:
                self._ended.wait(_IDLE_S)
        return None

    def work_on(self, scope: Scope, run_id: str) -> Run:
        """Work on one run, waiting until it is free.

        Raises:
            NotFound: there is no such run in the project.
        """
        while True:
            run = self._store.get_run(scope, run_id)
            if run.status not in ("queued", "running", "paused") or self._ended.is_set():
                return run
            leased = self._lease(run.scope)
            if leased is None:
                self._ended.wait(_IDLE_S)
                continue
            done = self._work_on(leased)
            if leased.run_id == run_id:
                return done

    def _next(self) -> Run | None:
        return self._lease(None)

    def _lease(self, scope: Scope | None) -> Run | None:
        milliseconds = round(self._config.run.lease_s * 1000)
        try:
            return self._store.lease_run(self._owner, milliseconds, scope).result()
        except StoreError as error:
            structlog.get_logger().warning("no_lease", reason=str(error))
            return None

    def _work_on(self, run: Run) -> Run:
        structlog.get_logger().info("run_leased", run_id=run.run_id, kind=run.kind)
        try:
            return machine.work_on(
                run, self._store, self._place, self._config, self._owner, self._failpoints
            )
        except (LeaseLost, StoreError) as error:
            structlog.get_logger().warning("run_left", run_id=run.run_id, reason=str(error))
            self._ended.wait(_IDLE_S)
            return run

    def _look(self, triggers: Triggers) -> None:
        try:
            triggers.look()
        except StoreError as error:
            structlog.get_logger().warning("triggers_not_read", reason=str(error))


def find_run(store: Store, run_id: str) -> Run:
    """Return a run by its id alone; raise NotFound."""
    for run in store.find_runs(None, limit=1000):
        if run.run_id == run_id:
            return run
    raise NotFound(f"run {run_id}")

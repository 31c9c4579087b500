"""The lease on a run: kept by a heartbeat, and the only way in which a worker changes its row.

Owns the thread that renews it and that learns what the run is asked to do. When another worker took
the run, the next look raises LeaseLost and nothing more is written. The heartbeat has a thread of
its own; all methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from typing import Unpack

import heedful_store
import structlog
from heedful_store import Control, Run, RunChanges, Store

from heedful_trainer.errors import LeaseLost

_LOOK_S = 0.5  # how soon a pause or a stop is seen


class RunLease:
    """One worker's hold on one run."""

    def __init__(self, store: Store, run: Run, owner: str, lease_s: float) -> None:
        self.run = run
        self._store, self._owner, self._lease_s = store, owner, lease_s
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lease", daemon=True)
        self._thread.start()

    @property
    def control(self) -> Control:
        """What the run is asked to do; not older than half a second or so."""
        return self.run.control

    def check(self) -> None:
        """Raise LeaseLost once another worker has the run."""
        if self._lost:
            raise LeaseLost(f"run {self.run.run_id} was taken by another worker")

    def update(self, **changes: Unpack[RunChanges]) -> Run:
        """Change the run's row durably."""
        self.check()
        try:
            ack = self._store.update_run(self.run.run_id, self._owner, **changes)
            self.run = ack.result()
        except heedful_store.LeaseLost as error:
            self._lost = True
            raise LeaseLost(str(error)) from error
        return self.run

    def close(self) -> None:
        """End the heartbeat; the lease lapses unless the run's last status freed it."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(min(_LOOK_S, self._lease_s / 4)):
            try:
                if time.monotonic() - renewed >= self._lease_s / 3:
                    milliseconds = round(self._lease_s * 1000)
                    ack = self._store.renew_run(self.run.run_id, self._owner, milliseconds)
                    self.run = ack.result()
                    renewed = time.monotonic()
                else:
                    self.run = self._store.get_run(self.run.scope, self.run.run_id)
            except (heedful_store.LeaseLost, heedful_store.NotFound):
                self._lost = True
                return
            except heedful_store.StoreError as error:
                # A store that is away for a moment costs the lease only if it stays away.
                structlog.get_logger().warning("lease_not_renewed", reason=str(error))

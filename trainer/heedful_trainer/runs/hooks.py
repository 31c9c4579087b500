"""What a run does between the steps of a training loop: yield, obey, show progress.

Owns the production form of ``methods.hooks.Hooks``. Progress reaches the store at most once a
second, the TensorBoard file at every step. Training thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from heedful_trainer.errors import RunStopped
from heedful_trainer.methods.hooks import Wanted
from heedful_trainer.runs.lease import RunLease
from heedful_trainer.runs.yielding import Yielder

_PROGRESS_S = 1.0
_PAUSE_LOOK_S = 0.2


class RunHooks:
    """The surroundings of a loop within a run."""

    def __init__(self, lease: RunLease, yielder: Yielder, tensorboard_dir: Path) -> None:
        self._lease, self._yielder = lease, yielder
        self._writer = SummaryWriter(str(tensorboard_dir))
        self._stage = ""
        self._shown_at = 0.0
        self._figures: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """Name the stage that is shown from now on."""
        self._stage, self._figures, self._shown_at = stage, {}, 0.0

    def breathe(self) -> None:
        """Give way after a micro-step."""
        self._lease.check()
        self._yielder.breathe()

    def wanted(self) -> Wanted:
        """Return what the run is asked to do."""
        control = self._lease.control
        return control or "go"

    def wait_while_paused(self) -> None:
        """Keep the lease and wait until the run may go on."""
        self._lease.update(status="paused")
        while (control := self._lease.control) == "pause":
            self._lease.check()
            time.sleep(_PAUSE_LOOK_S)
        if control == "stop":
            raise RunStopped("stopped while it was paused")
        self._lease.update(status="running")

    def obey(self) -> None:
        """Between stages, where there is nothing to save: stop or wait."""
        wanted = self.wanted()
        if wanted == "stop":
            raise RunStopped("stopped between two stages")
        if wanted == "pause":
            self.wait_while_paused()

    def report(self, fraction: float, figures: Mapping[str, float], step: int) -> None:
        """Show progress."""
        self._figures |= figures
        for name, value in figures.items():
            self._writer.add_scalar(f"{self._stage}/{name}", value, step)
        now = time.monotonic()
        if now - self._shown_at < _PROGRESS_S:
            return
        self._shown_at = now
        finite = {name: value for name, value in self._figures.items() if abs(value) < 1e30}
        self._lease.update(progress={"fraction": fraction, "figures": finite})

    def close(self) -> None:
        """Flush what was written."""
        self._writer.close()

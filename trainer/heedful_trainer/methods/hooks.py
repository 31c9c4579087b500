"""What a training loop asks of whoever runs it, between its steps.

Owns the protocol only; ``runs`` has the production form, ``NoHooks`` is for training without a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

Wanted = Literal["go", "pause", "stop"]


class Hooks(Protocol):
    """The surroundings of a loop."""

    def breathe(self) -> None:
        """Give way to serving after a micro-step; raises LeaseLost where the run is not ours."""
        ...

    def wanted(self) -> Wanted:
        """Return what the loop shall do after this step; it saves before pausing or stopping."""
        ...

    def wait_while_paused(self) -> None:
        """Block until a pause ends; raises RunStopped where it ends in a stop."""
        ...

    def report(self, fraction: float, figures: Mapping[str, float], step: int) -> None:
        """Show progress: share of the stage done, and named figures."""
        ...


class NoHooks:
    """Nobody watches."""

    def breathe(self) -> None:
        """Do nothing."""

    def wanted(self) -> Wanted:
        """Go on."""
        return "go"

    def wait_while_paused(self) -> None:
        """Do nothing."""

    def report(self, fraction: float, figures: Mapping[str, float], step: int) -> None:
        """Do nothing."""

"""Named places in product code where a test can make the process die, fail or wait.

``HEEDFUL_FAILPOINTS="before_commit=3:kill,before_ack=*:sleep_50"`` kills the process at the third
commit and delays every acknowledgement by 50 ms. Unset, a failpoint is one false test. Owns the
syntax and the counts; it does not know what the places mean. Hits are counted under a lock.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

ENVIRONMENT_NAME = "HEEDFUL_FAILPOINTS"


class FailpointError(RuntimeError):
    """Raised by a failpoint whose action is ``raise``."""


@dataclass(frozen=True, slots=True)
class _Trap:
    nth: int | None  # None: every time
    action: str


class Failpoints:
    """The traps of one process part, with how often each place was reached."""

    def __init__(self, specification: str = "") -> None:
        self._traps = dict(_parse(part) for part in specification.split(",") if part.strip())
        self._hits = dict.fromkeys(self._traps, 0)
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Failpoints:
        """Return the traps that the environment names; none when it is silent."""
        return cls(environment.get(ENVIRONMENT_NAME, ""))

    def hit(self, name: str) -> None:
        """Pass the place ``name``; act if a trap there is due."""
        if not self._traps or name not in self._traps:
            return
        trap = self._traps[name]
        with self._lock:
            self._hits[name] += 1
            due = trap.nth is None or self._hits[name] == trap.nth
        if due:
            _act(name, trap.action)


def _parse(part: str) -> tuple[str, _Trap]:
    name, _, rest = part.strip().partition("=")
    nth, _, action = rest.partition(":")
    known = action in ("kill", "raise") or action.removeprefix("sleep_").isdigit()
    if not name or not known or not (nth == "*" or nth.isdigit()):
        raise ValueError(f"failpoint {part!r}: expected name=nth:kill|raise|sleep_<ms>")
    return name, _Trap(None if nth == "*" else int(nth), action)


def _act(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal may be delivered a moment later; nothing must run until then
    if action == "raise":
        raise FailpointError(name)
    time.sleep(int(action.removeprefix("sleep_")) / 1000)

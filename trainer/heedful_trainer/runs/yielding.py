"""Giving way to serving: the process's priority, and pauses while people wait for answers.

Owns the poll of the server's load and the bound on all pauses together, so that a busy server slows
training down and never stops it. The number of compute threads never changes. The training thread
calls ``Yielder.breathe``; the poll has a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from heedful_trainer.config import YieldSettings

IsBusy = Callable[[], bool]

_LEAST_PRIORITY = 19
_AUTOGROUP = Path("/proc/self/autogroup")


def lower_priority(scheduling: str) -> None:
    """Make this process give way to others; "none" leaves it as it is."""
    if scheduling == "idle":
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except (OSError, AttributeError):  # not on this system, or not allowed
            structlog.get_logger().info("scheduling_idle_unavailable", instead="nice")
            scheduling = "nice"
    if scheduling == "nice":
        os.nice(_LEAST_PRIORITY)
        _lower_session()


def _lower_session() -> None:
    """Lower this process's session too, where it leads one of its own, as under ``heedful up``.

    Linux's autogroups share the cores among sessions first; a nice level counts within one alone.
    """
    if os.getsid(0) != os.getpid():
        return
    try:
        _AUTOGROUP.write_text(str(_LEAST_PRIORITY))
    except OSError as error:  # not on this system, or no permission
        structlog.get_logger().info("session_priority_unchanged", reason=str(error))


class Yielder:
    """Pauses between micro-steps while interactive requests run.

    Args:
        is_busy: whether interactive requests run now; blocks, and does not raise.
        settings: how often and how long.
    """

    def __init__(self, is_busy: IsBusy, settings: YieldSettings) -> None:
        self._is_busy, self._settings = is_busy, settings
        self._busy = False
        self._started_s = time.monotonic()
        self.paused_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="load-poll", daemon=True)
        self._thread.start()

    def breathe(self) -> None:
        """Pause if somebody waits and the pauses so far leave room."""
        if not self._busy:
            return
        elapsed = time.monotonic() - self._started_s
        room = self._settings.max_paused_share * elapsed - self.paused_s
        pause = min(self._settings.pause_s, room)
        if pause > 0:
            time.sleep(pause)
            self.paused_s += pause

    def close(self) -> None:
        """End the poll."""
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(self._settings.poll_s):
            self._busy = self._is_busy()

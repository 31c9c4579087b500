"""Giving way: pauses only while people wait, and never for more than the stated share."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from heedful_trainer.config import YieldSettings
from heedful_trainer.runs.yielding import Yielder, lower_priority


def breathing(is_busy: Callable[[], bool], steps: int, **settings: float) -> tuple[float, float]:
    """Return (seconds paused, seconds in all) of some steps of 10 ms."""
    yielder = Yielder(is_busy, YieldSettings(poll_s=0.01, **settings))
    started = time.monotonic()
    for _ in range(steps):
        time.sleep(0.01)
        yielder.breathe()
    elapsed = time.monotonic() - started
    yielder.close()
    return yielder.paused_s, elapsed


def test_a_quiet_server_costs_nothing() -> None:
    assert breathing(lambda: False, 20)[0] == 0


def test_a_busy_server_gets_pauses_but_never_all_the_time() -> None:
    paused, elapsed = breathing(lambda: True, 40, pause_s=0.05, max_paused_share=0.5)
    assert 0.1 < paused <= 0.5 * elapsed + 0.05
    paused, elapsed = breathing(lambda: True, 20, pause_s=10.0, max_paused_share=0.2)
    assert paused <= 0.2 * elapsed + 0.05


def test_least_priority_is_taken_in_a_child() -> None:
    pid = os.fork()
    if pid == 0:
        lower_priority("nice")
        os._exit(os.nice(0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 19


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no autogroups here")
@pytest.mark.parametrize(("leads_session", "expected"), [(True, 19), (False, 0)])
def test_a_session_of_its_own_gives_way_as_a_whole(leads_session: bool, expected: int) -> None:
    parent = os.fork()
    if parent == 0:
        os.setsid()
        child = 0 if leads_session else os.fork()
        if child == 0:
            lower_priority("nice")
            os._exit(int(Path("/proc/self/autogroup").read_text().split()[-1]))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == expected


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="not on this system")
def test_idle_scheduling_falls_back_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "nice", called.append)
    lower_priority("idle")
    assert called == [19]

"""The trainer as a program that the command line starts for one run.

Owns when it is started, where its log goes and what it said last. It is detached from the terminal:
Ctrl-C here leaves it at work. Imports nothing of the trainer.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heedful.cli.programs import TRAINER, find_program
from heedful.model_types import Refresh
from heedful.sync import Client

LEASE_WAIT_S = 2.0
"""Seconds for a trainer that is running already to take a new run."""
_POLL_S = 0.2
_SHOWN_LINES = 5


@dataclass(frozen=True, slots=True)
class Worker:
    """A trainer that works on one run, and the file that its log goes to."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def failure(self) -> str:
        """Returns why it ended before its work was done; empty while it runs or ended well."""
        code = self.process.poll()
        if code in (None, 0):
            return ""
        return f"heedful-trainer ended with code {code}; its log: {self.log}\n{self._last_lines()}"

    def _last_lines(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_SHOWN_LINES:])


def wait_for_lease(
    client: Client, run_id: str, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Refresh:
    """Returns a new run once a trainer has taken it, or as it is when the time is over.

    Raises:
        HeedfulError: the server does not answer.
    """
    end_s = time.monotonic() + seconds
    while True:
        refresh = client.get_refresh(run_id)
        if refresh.status != "queued" or time.monotonic() >= end_s:
            return refresh
        sleep(_POLL_S)


def start(run_id: str, target: str, home: Path | None, config: Path | None) -> Worker | None:
    """Starts `heedful-trainer work` for one run; None where it is not installed here.

    Raises:
        OSError: it could not be started, or its log could not be opened.
    """
    program = find_program(TRAINER)
    if program is None:
        return None
    log = home_directory(home) / "logs" / f"trainer-{run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["work", "--once", "--run", run_id, "--target", target, *places(home, config)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
    return Worker(process, log)


def environment() -> dict[str, str]:
    """Returns our environment with the key and the certificate where the trainer looks for them."""
    given = dict(os.environ)
    for ours, its in (
        ("HEEDFUL_API_KEY", "HEEDFUL_TRAINER__API_KEY"),
        ("HEEDFUL_TLS_CA", "HEEDFUL_TRAINER__TLS_CA"),
    ):
        if given.get(ours):
            given.setdefault(its, given[ours])
    return given


def places(home: Path | None, config: Path | None) -> Sequence[str]:
    """Returns the arguments that tell server and trainer where their things are."""
    return [
        *(("--config", str(config)) if config else ()),
        *(("--home", str(home)) if home else ()),
    ]


def home_directory(home: Path | None) -> Path:
    """Returns the home directory that was named here, in the environment, or is the default."""
    return home or Path(os.environ.get("HEEDFUL_HOME") or "~/.heedful").expanduser()

"""One refresh run from the terminal: started, given a trainer if it needs one, and watched.

Owns that order; `trainer_process.py` owns the trainer as a program, `refresh_view.py` how a run
looks.
"""

import queue
import threading
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import typer

from heedful.cli import refresh_view as view
from heedful.cli import trainer_process
from heedful.cli.connection import project
from heedful.cli.output import ExitCode, fail, stderr
from heedful.errors import AlreadyExists, Unavailable
from heedful.model_types import Refresh
from heedful.sync import Client

_QUIET_S = 1.0
"""Seconds without news after which the trainer is looked at."""


class MethodChoice(StrEnum):
    """Choices of --method."""

    AUTO = "auto"
    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    PPO_PTX = "ppo_ptx"


def begin(client: Client, method: MethodChoice, overrides: dict[str, str]) -> Refresh:
    """Queues a run, or ends the command where another one has not ended.

    Raises:
        HeedfulError: the server refused.
    """
    try:
        run = client.start_refresh(method.value, overrides=overrides)
    except AlreadyExists:
        unfinished = next((run for run in client.list_refreshes() if not run.is_over), None)
        hint = _ways_out(client, unfinished.run_id) if unfinished else ""
        raise fail("a refresh of this project has not ended yet", ExitCode.FAILED, hint) from None
    stderr().print(f"run {run.run_id}", style="dim", markup=False)
    return run


def attend(
    client: Client, run: Refresh, home: Path | None, config: Path | None
) -> trainer_process.Worker | None:
    """Starts a trainer for a run that none takes by itself; says where that cannot be done.

    Raises:
        HeedfulError: the server does not answer.
    """
    seen = trainer_process.wait_for_lease(client, run.run_id, trainer_process.LEASE_WAIT_S)
    if seen.status != "queued":
        return None
    try:
        worker = trainer_process.start(run.run_id, client.target, home, config)
    except OSError as error:
        raise fail(f"the trainer could not be started: {error}", ExitCode.FAILED) from None
    if worker is None:
        stderr().print(
            "no trainer takes the run, and none is installed here: pip install 'heedful[train]', "
            "or run 'heedful-trainer watch' where the server's home is",
            style="yellow",
            markup=False,
        )
        return None
    stderr().print(
        f"trainer started, its log: {worker.log}", style="dim", markup=False, soft_wrap=True
    )
    return worker


def watch_run(
    client: Client,
    run_id: str,
    as_json: bool,
    worker: trainer_process.Worker | None = None,
) -> Refresh:
    """Shows a run until it is over and returns it; Ctrl-C detaches and ends the command.

    Raises:
        HeedfulError: the server stayed away.
    """
    try:
        last = client.get_refresh(run_id)
        with view.view_for(as_json) as shown:
            shown.show(last)
            for refresh in changes(client, run_id):
                if refresh is not None:
                    last = refresh
                    shown.show(refresh)
                # A trainer that died says nothing more; its run stays as it was.
                elif worker is not None and worker.failure():
                    break
    except KeyboardInterrupt:
        back = _typed(client, "watch", run_id)
        stderr().print(f"\nThe run goes on. Come back with: {back}", soft_wrap=True)
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    except Unavailable:
        stderr().print(f"Come back with: {_typed(client, 'watch', run_id)}", soft_wrap=True)
        raise
    if worker is not None and not last.is_over and (failure := worker.failure()):
        raise fail("the trainer died", ExitCode.FAILED, f"{failure}\n{_ways_out(client, run_id)}")
    return last


def _ways_out(client: Client, run_id: str) -> str:
    watch, stop = _typed(client, "watch", run_id), _typed(client, "stop", run_id)
    return f"Watch it: {watch}\nEnd it: {stop}"


def _typed(client: Client, command: str, run_id: str) -> str:
    """Returns what to type here, where the client may be in another project than the terminal."""
    elsewhere = "" if client.project == project() else f"HEEDFUL_PROJECT={client.project} "
    return f"{elsewhere}heedful refresh {command} {run_id}"


def changes(client: Client, run_id: str) -> Iterator[Refresh | None]:
    """Yields a run whenever it changed, and None now and then where it did not.

    Raises:
        HeedfulError: the server stayed away.
    """
    arrived: queue.SimpleQueue[Refresh | Exception] = queue.SimpleQueue()

    def watch_it() -> None:
        try:
            for refresh in client.watch_refresh(run_id):
                arrived.put(refresh)
        except Exception as error:
            arrived.put(error)

    # Ends with the client at the latest: closing it ends the stream.
    threading.Thread(target=watch_it, name="heedful-watch", daemon=True).start()
    while True:
        try:
            item = arrived.get(timeout=_QUIET_S)
        except queue.Empty:
            yield None
            continue
        if isinstance(item, Exception):
            raise item
        yield item
        if item.is_over:
            return

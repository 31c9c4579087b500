"""Runs a refresh in children that are killed at named places, until it has ended.

A program of its own: it imports everything once and forks, so that twenty kills do not cost twenty
imports. Arguments: base directory, the home of a refresh that is left alone, the home of one that
is killed, and the failpoints of each of its children in order. It prints how each child ended.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

from heedful_store import Failpoints, Store
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.logging_setup import configure_logging
from heedful_trainer.runs.worker import Worker

OVERRIDES = {
    "base.dtype": "float32",
    "lora.rank": "4",
    "reward.heads": "2",
    "reward.epochs": "2",
    "reward.optimiser.batch_size": "4",
    "reward.optimiser.min_steps": "0",
    "dpo.optimiser.batch_size": "4",
    "dpo.optimiser.min_steps": "0",
    "dpo.optimiser.learning_rate": "0.005",
    "gate.enabled": "false",
    "run.lease_s": "0.2",
    "run.checkpoint_s": "1e-9",
    "run.threads": "1",
    "yielding.scheduling": "none",
    "target": "127.0.0.1:1",
}


def child(home: Path, url: str, base: str, failpoints: str) -> int:
    os.environ["HEEDFUL_FAILPOINTS"] = failpoints
    config = with_overrides(TrainerConfig(), {**OVERRIDES, "base.directory": base})
    with Store(url, failpoints=Failpoints()) as store:
        worker = Worker(store, Place(home, url, "personal"), config, Failpoints(failpoints))
        done = None
        while done is None:
            done = worker.work(once=True)
    return 0 if done.status == "finished" else 1


def main(base: str, whole: str, killed: str, *kills: str) -> None:
    warnings.simplefilter("ignore")
    configure_logging("critical")
    for home, failpoints in [(whole, ""), *((killed, kill) for kill in (*kills, ""))]:
        pid = os.fork()
        if pid == 0:
            os._exit(child(Path(home), f"sqlite:///{home}/heedful.db", base, failpoints))
        _, status = os.waitpid(pid, 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if died else f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A run from its lease to its last status: stages in order, each once.

Owns the order, what a restart skips (stages whose evidence is stored), and which error becomes
which status. Training thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import heedful
import structlog
import torch
from heedful_store import Failpoints, Run, Store, StoreError

from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.errors import HeedfulTrainerError, LeaseLost, RunStopped
from heedful_trainer.runs import connecting
from heedful_trainer.runs.context import DATASET, RunContext, run_directory
from heedful_trainer.runs.hooks import RunHooks
from heedful_trainer.runs.judging import judge_candidate
from heedful_trainer.runs.learning import (
    PAIRS,
    take_snapshot,
    train_reward_model,
    train_the_policy,
)
from heedful_trainer.runs.lease import RunLease
from heedful_trainer.runs.ppo_policy import forget_rollouts
from heedful_trainer.runs.publishing import publish_versions
from heedful_trainer.runs.yielding import Yielder

Stage = Callable[[RunContext], Mapping[str, Any]]

STAGES: tuple[tuple[str, Stage], ...] = (
    ("snapshot", take_snapshot),
    ("reward", train_reward_model),
    ("policy", train_the_policy),
    ("gate", judge_candidate),
    ("publish", publish_versions),
)


def work_on(
    run: Run,
    store: Store,
    place: Place,
    config: TrainerConfig,
    owner: str,
    failpoints: Failpoints,
) -> Run:
    """Work on a leased run until its last status, and return it.

    Raises:
        LeaseLost: another worker took the run.
        StoreError: the store failed; the run is leased again later.
    """
    log = structlog.get_logger().bind(run_id=run.run_id, project=run.scope.project)
    lease = RunLease(store, run, owner, config.run.lease_s)
    directory = run_directory(place.home, run.run_id)
    try:
        _work(lease, store, place, config, failpoints)
    except (LeaseLost, StoreError):
        raise
    except SystemExit:
        # A signal: whoever leases the run next goes on from its checkpoint, without a wait.
        lease.update(status="queued")
        raise
    except RunStopped as stopped:
        log.info("run_stopped", reason=str(stopped))
        lease.update(status="stopped", failure=str(stopped))
    except HeedfulTrainerError as error:
        log.warning("run_failed", reason=str(error))
        lease.update(status="failed", failure=f"{type(error).__name__}: {error}")
    except Exception as error:
        # A defect must not be retried for ever by whoever leases the run next.
        log.exception("run_failed")
        lease.update(status="failed", failure=f"internal error: {type(error).__name__}: {error}")
    finally:
        lease.close()
    # People's words stay in the log, where an erasure finds them.
    (directory / DATASET).unlink(missing_ok=True)
    (directory / "report" / PAIRS).unlink(missing_ok=True)
    forget_rollouts(directory)
    if not config.run.keep_checkpoints and lease.run.status != "stopped":
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return lease.run


def _work(
    lease: RunLease, store: Store, place: Place, config: TrainerConfig, failpoints: Failpoints
) -> None:
    run = lease.run
    # Once resolved, a run keeps its settings, whatever the next worker's own are.
    resolved = run.code_version != ""
    config = with_overrides(TrainerConfig() if resolved else config, run.config)
    if not resolved:
        if run.method != "auto":
            config = with_overrides(config, {"method": run.method})
        lease.update(
            config=_flat(config.model_dump(mode="json")),
            seeds={"run": config.run.seed},
            code_version=code_version(),
        )
    torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
    torch.use_deterministic_algorithms(True)

    def connect() -> heedful.Client:
        return connecting.client(config, run.scope.project)

    load = connecting.ServerLoad(config, run.scope.project)
    yielder = Yielder(load.is_busy, config.yielding)
    tensorboard = run_directory(place.home, run.run_id) / "tensorboard"
    hooks = RunHooks(lease, yielder, tensorboard)
    try:
        context = RunContext(store, place, config, lease, hooks, connect, failpoints)
        for name, stage in STAGES:
            if name in lease.run.evidence:
                continue
            hooks.obey()
            hooks.begin(name)
            lease.update(stage=name, progress={"fraction": 0.0, "figures": {}})
            structlog.get_logger().info("stage_begins", run_id=run.run_id, stage=name)
            evidence = stage(context)
            failpoints.hit("trainer_stage_end")
            lease.update(evidence={name: evidence})
            failpoints.hit("trainer_stage_recorded")
        lease.update(stage="done", status="finished", progress={"fraction": 1.0, "figures": {}})
    finally:
        hooks.close()
        yielder.close()
        load.close()


def code_version() -> str:
    """Return the version of the installed package."""
    return metadata.version("heedful")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return settings by dotted path, as a run's row holds its overrides."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found

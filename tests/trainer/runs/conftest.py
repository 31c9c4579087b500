"""A worker in this process, on the tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heedful_store import Failpoints, Run, Scope, Store, uuid7
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.runs.worker import Worker

MakeWorker = Callable[..., Worker]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, f"sqlite:///{tmp_path / 'heedful.db'}", "personal")


@pytest.fixture
def make_worker(
    store: Store, place: Place, config: TrainerConfig, tiny_model_dir: Path
) -> MakeWorker:
    def make(failpoints: str = "", **overrides: Any) -> Worker:
        quick = {
            "base.directory": str(tiny_model_dir),
            "gate.enabled": "false",
            "target": "127.0.0.1:1",
            "run.lease_s": "2",
            "dpo.epochs": "1",
            "reward.epochs": "1",
        }
        changed = with_overrides(config, {**quick, **overrides})
        return Worker(store, place, changed, Failpoints(failpoints))

    return make


@pytest.fixture
def queue(store: Store) -> Callable[..., Run]:
    def create(**more: Any) -> Run:
        return store.create_run(Run(run_id=uuid7(), scope=Scope(), **more)).result()

    return create

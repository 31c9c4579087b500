"""A refresh that is killed at twenty places ends in the weights of one that was not."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heedful_store import Run, Scope, Store, uuid7

PROGRAM = Path(__file__).with_name("killed_refresh.py")
# In the order in which a refresh reaches them; each child goes on where the last one died.
KILLS = [
    "trainer_stage_end=1:kill",  # the dataset is written, not recorded
    "trainer_stage_recorded=1:kill",
    *["trainer_step=1:kill"] * 3,  # the reward model; every step is saved, one is lost
    "trainer_step=3:kill",
    "trainer_step=2:kill",
    *["trainer_checkpoint_written=1:kill"] * 2,  # written aside, not yet in place
    "trainer_stage_end=1:kill",  # the reward adapter is sealed, not recorded
    "trainer_stage_recorded=1:kill",
    *["trainer_step=2:kill"] * 3,  # the policy
    "trainer_checkpoint_written=2:kill",
    "trainer_stage_end=1:kill",
    "trainer_stage_recorded=2:kill",  # the gate, after the policy was recorded
    "before_publish_rename=1:kill",  # the reward model's files
    "after_publish_rename=1:kill",  # in place, without a row
    "trainer_stage_end=1:kill",
]


def refresh(base: Path, whole: Path, killed: Path) -> list[str]:
    command = [sys.executable, "-P", str(PROGRAM), str(base), str(whole), str(killed), *KILLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def weights(home: Path) -> dict[str, str]:
    """Hashes of every published tensor file, by version."""
    found = {}
    for path in sorted((home / "policies" / "default" / "default").glob("*/*.safetensors")):
        found[f"{path.parent.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.timeout(240)
def test_twenty_kills_change_nothing(
    tmp_path: Path, tiny_model_dir: Path, log_pairs: Callable[..., None]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    with Store(f"sqlite:///{whole / 'heedful.db'}") as store:
        log_pairs(store, 40)
        run = store.create_run(Run(run_id=uuid7(), scope=Scope())).result()
    shutil.copytree(whole, killed)
    assert len(KILLS) == 20
    ends = refresh(tiny_model_dir, whole, killed)
    assert ends == ["exit", "0", *["killed"] * 20, "exit", "0"]
    expected = weights(whole)
    assert set(expected) == {
        "r1/adapter_model.safetensors",
        "r1/reward_heads.safetensors",
        "v1/adapter_model.safetensors",
    }
    assert weights(killed) == expected
    _same_evidence(whole, killed, run.run_id)


def _same_evidence(whole: Path, killed: Path, run_id: str) -> None:
    rows: list[Any] = []
    for home in (whole, killed):
        with Store(f"sqlite:///{home / 'heedful.db'}") as store:
            found = store.get_run(Scope(), run_id)
            assert [p.version for p in store.find_policies(Scope())] == ["v1", "r1"]
            rows.append((found.status, found.dataset_id, found.evidence["policy"]["report"]))
    assert rows[0] == rows[1]

"""A real process, killed at twenty places, ends in the bits that it would have ended in."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "tiny.py"
# Four iterations: one part and two steps each, and looks of one part at 0, 2 and 4.
PLACES = [
    *((f"rollouts_stored={n}") for n in (1, 3, 4, 6, 7)),
    *((f"before_rollouts_rename={n}") for n in (1, 2, 4, 5, 7)),
    *((f"rollouts_taken={n}") for n in (2, 4)),
    *((f"ppo_step={n}") for n in (1, 2, 3, 5, 6, 8)),
    *((f"ppo_saved={n}") for n in (1, 3)),
]

Train = Callable[[Path, str], int]


@pytest.fixture(scope="module")
def train(tiny_model_dir: Path) -> Iterator[Train]:
    command = [sys.executable, "-P", str(PROGRAM), str(tiny_model_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin
        assert program.stdout

        def trained(run_dir: Path, failpoints: str = "") -> int:
            assert program.stdin
            assert program.stdout
            program.stdin.write(json.dumps([str(run_dir), failpoints]) + "\n")
            program.stdin.flush()
            return int(program.stdout.readline() or -999)

        yield trained
        program.stdin.close()
        assert program.stderr
        assert program.wait(timeout=30) == 0, program.stderr.read()


@pytest.mark.timeout(240)
def test_killed_at_twenty_places_it_ends_in_the_same_bits(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", "") == 0
    whole = json.loads((tmp_path / "whole" / "end.json").read_text())
    assert len(PLACES) == 20
    for place in PLACES:
        run_dir = tmp_path / place
        assert train(run_dir, f"{place}:kill") == -signal.SIGKILL, place
        assert not (run_dir / "end.json").exists()
        assert train(run_dir, "") == 0
        assert json.loads((run_dir / "end.json").read_text()) == whole, place


def test_one_run_that_dies_again_and_again_ends_in_the_same_bits(
    train: Train, tmp_path: Path
) -> None:
    assert train(tmp_path / "whole", "") == 0
    whole = json.loads((tmp_path / "whole" / "end.json").read_text())
    deaths = 0
    while train(tmp_path / "often", "ppo_step=3:kill,rollouts_stored=3:kill") != 0:
        deaths += 1
        assert deaths < 20
    assert deaths >= 2
    assert json.loads((tmp_path / "often" / "end.json").read_text()) == whole

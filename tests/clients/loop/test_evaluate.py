"""`heedful evaluate`: the trainer gets the arguments, and where the server and its key are."""

import os
import subprocess
import sys
from pathlib import Path

MAIN = "from heedful.cli import main; main()"


def test_the_trainer_is_told_everything(tmp_path: Path):
    (tmp_path / "heedful").write_text(MAIN)
    program = tmp_path / "heedful-trainer"
    told = "$HEEDFUL_TRAINER__TARGET $HEEDFUL_TRAINER__API_KEY $HEEDFUL_PROJECT"
    program.write_text(f'#!/bin/sh\necho "$*"\necho "{told}"\nexit 3\n')
    program.chmod(0o755)
    given = {"HEEDFUL_TARGET": "h:1", "HEEDFUL_API_KEY": "key", "HEEDFUL_PROJECT": "mine"}
    done = subprocess.run(
        [sys.executable, tmp_path / "heedful", "evaluate", "v3", "--limit", "5"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **given},
    )
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["evaluate v3 --limit 5", "h:1 key mine"]

"""Runs the tests of the Triton kernels in a process that interprets them, where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heedful_kernels import launch


@pytest.mark.timeout(400)
@pytest.mark.skipif(launch.INTERPRETED, reason="this process interprets already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this process runs the kernels natively")
def test_the_triton_kernels_pass_their_tests_in_the_interpreter() -> None:
    if not launch.HAS_TRITON:
        pytest.skip("Triton is not installed")
    folder = Path(__file__).parent
    command = [sys.executable, "-P", "-m", "pytest", str(folder), "-m", "triton", "-q", "-x"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=folder.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

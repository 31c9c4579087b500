"""The first thing a user does: the example of the README against the default model."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"
DEFAULT_PORT = 50051


@pytest.mark.model
def test_quickstart_answers_with_paris(launch, default_model_dir):
    with socket.socket() as sock:
        # The example takes no arguments, so it talks to the default port.
        if sock.connect_ex(("127.0.0.1", DEFAULT_PORT)) == 0:
            pytest.skip(f"port {DEFAULT_PORT} is in use")
    defaults = "engine.kv_cache_bytes=0"
    with launch(default_model_dir, defaults, port=DEFAULT_PORT, quantize="auto"):
        done = subprocess.run(
            [sys.executable, "-P", str(QUICKSTART)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout

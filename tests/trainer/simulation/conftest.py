"""A real server with a tiny model, for simulated users and for the gate's sampler."""

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import heedful
import pytest

START_TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a server that is stopped afterwards."""
    directory = tmp_path_factory.mktemp("server")
    log = directory / "log"
    command = [sys.executable, "-P", "-m", "heedful_server.main", "serve"]
    command += ["--model", str(tiny_model_dir), "--home", str(directory / "home")]
    command += ["--port", "0", "--http-port", "0", "--threads", "1"]
    command += ["--set", "engine.kv_cache_bytes=16777216"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEEDFUL_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, cwd=directory, env=environ)
    try:
        found = _wait_target(process, log)
        with heedful.Client(found) as client:
            client.wait_ready(START_TIMEOUT_S)
        yield found
    finally:
        process.terminate()
        process.wait(40)


@pytest.fixture
async def client(target: str) -> AsyncIterator[heedful.AsyncClient]:
    async with heedful.AsyncClient(target, timeout_s=60) as client:
        yield client


def _wait_target(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}") and "grpc" in json.loads(line):
                return str(json.loads(line)["grpc"])
        time.sleep(0.05)
    pytest.fail(f"no open port\n{log.read_text(errors='replace')[-4000:]}")

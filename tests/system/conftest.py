"""Starts the real program `heedful-server serve` with a tiny model, and looks at it from outside.

Everything goes through what an operator has: the command line, the log on standard error, the two
ports, the process table and signals.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import heedful
import pytest

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0
POLL_S = 0.02
KV_CACHE_BYTES = 16 * 1024 * 1024


def _read_proc(path: Path) -> str:
    """A file of the process table; empty where its thread or process has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@dataclass
class ServerProcess:
    """One run of the program."""

    process: subprocess.Popen[bytes]
    log_path: Path
    target: str = ""
    http: str = ""

    def logged(self) -> list[dict]:
        """Return the complete lines of the log so far."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def logged_value(self, key: str) -> str:
        """Return the first value logged under a key; empty where there is none yet."""
        return next((str(line[key]) for line in self.logged() if key in line), "")

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Poll a condition; fail with the log where it does not come or the program ends."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            problem = f"no {what} within {timeout_s} s" if time.monotonic() > end_s else ""
            if self.process.poll() is not None:
                problem = f"exit code {self.process.returncode} before {what}"
            if problem:
                pytest.fail(f"{problem}\n{self.log_path.read_text(errors='replace')[-4000:]}")
            time.sleep(POLL_S)

    def wait_ports(self) -> None:
        self.wait_until(lambda: self.logged_value("http"), "open ports", START_TIMEOUT_S)
        self.target = self.logged_value("grpc")
        self.http = f"http://{self.logged_value('http')}"

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.get("/readyz")[0] == 200, "readiness", START_TIMEOUT_S)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET on the HTTP port."""
        try:
            with urllib.request.urlopen(self.http + path, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Return the value of a metric that has no labels."""
        lines = self.get("/metrics")[1].splitlines()
        (value,) = [line.split()[1] for line in lines if line.split()[0] == name]
        return float(value)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine child, None while there is none."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in _read_proc(task / "children").split():
                if "heedful_server.engine.main" in _read_proc(Path(f"/proc/{pid}/cmdline")):
                    return int(pid)
        return None

    def kill_engine(self) -> int:
        """Kill the engine child and return the process id it had."""
        pid = self.engine_pid
        assert pid is not None, "there is no engine to kill"
        os.kill(pid, signal.SIGKILL)
        return pid

    def terminate(self) -> int:
        """Ask the program to end and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Return a context manager `launch(model, *settings)` around one run of the program."""

    @contextmanager
    def launched(
        model: Path,
        *settings: str,
        home: Path | None = None,
        port: int = 0,
        quantize: str = "int4",  # which the native kernels take, where they are built
        wait_ready: bool = True,
        failpoints: str = "",
    ) -> Iterator[ServerProcess]:
        directory = tmp_path_factory.mktemp("server")
        environ = {k: v for k, v in os.environ.items() if not k.startswith("HEEDFUL_")}
        environ["HEEDFUL_FAILPOINTS"] = failpoints
        command = [sys.executable, "-P", "-m", "heedful_server.main", "serve"]
        command += ["--model", str(model), "--home", str(home or directory / "home")]
        command += ["--quantize", quantize]
        command += ["--port", str(port), "--http-port", "0", "--threads", "2"]
        command += ["--set", f"engine.kv_cache_bytes={KV_CACHE_BYTES}"]
        command += [part for setting in settings for part in ("--set", setting)]
        log_path = directory / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, stderr=log, cwd=directory, env=environ)
        server = ServerProcess(process, log_path)
        try:
            server.wait_ports()
            if wait_ready:
                server.wait_ready()
            yield server
        finally:
            process.kill()
            process.wait(10)

    return launched


@pytest.fixture(scope="session")
def shared_server(launch: Callable, tiny_model_dir: Path) -> Iterator[ServerProcess]:
    """One server for every test that leaves it as it was; it must end cleanly."""
    with launch(tiny_model_dir) as server:
        yield server
        assert server.terminate() == 0


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server; whatever a test does with it must leave its engine alive."""
    engine_pid = shared_server.engine_pid
    yield shared_server
    assert shared_server.engine_pid == engine_pid
    assert shared_server.get("/readyz")[0] == 200


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[heedful.AsyncClient]:
    async with heedful.AsyncClient(server.target, timeout_s=60) as client:
        yield client

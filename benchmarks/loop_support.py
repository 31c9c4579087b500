"""What the benchmarks of the learning loop share: a real server in a home of its own, and results.

The home is temporary, so that nothing of the user's is read or changed but the pulled model.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import heedful
from heedful_trainer.gate import Answer, Draw, Sampler
from heedful_trainer.gate.sampler import ScoreItem

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_READY_S = 300.0
_STOP_S = 60.0


@dataclass(frozen=True)
class LoopServer:
    """A running server and where it keeps its files."""

    target: str
    home: Path
    model: str


@contextmanager
def loop_server(
    model: str, home: Path | None = None, settings: tuple[str, ...] = ()
) -> Iterator[LoopServer]:
    """Run a server on a free port; yield it once it serves, and stop it afterwards."""
    with tempfile.TemporaryDirectory(prefix="heedful-bench-") as temporary:
        directory = home or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        command = [str(program("heedful-server")), "serve", "--model", str(model_path(model))]
        command += ["--home", str(directory), "--port", "0", "--http-port", "0"]
        command += [part for setting in settings for part in ("--set", setting)]
        log = directory / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            target = _wait_target(process, log)
            with heedful.Client(target) as client:
                client.wait_ready(_READY_S)
            yield LoopServer(target, directory, model)
        finally:
            process.terminate()
            process.wait(_STOP_S)


class RememberingSampler:
    """A sampler that asks the server for nothing twice."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._answers: dict[object, list[Answer]] = {}
        self._scores: dict[object, list[tuple[float, ...]]] = {}

    async def answer(
        self, model: str, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> list[Answer]:
        """Return answers."""
        key = (model, repr(prompts), draw)
        if key not in self._answers:
            self._answers[key] = await self._sampler.answer(model, prompts, draw)
        return self._answers[key]

    async def score(self, model: str, items: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        """Return log-probs."""
        key = (model, repr(items))
        if key not in self._scores:
            self._scores[key] = await self._sampler.score(model, items)
        return self._scores[key]

    def forget(self, model: str) -> None:
        """Drop what a candidate said."""
        for kept in (self._answers, self._scores):
            for key in [key for key in kept if key[0] == model]:  # type: ignore[index]
                del kept[key]  # type: ignore[arg-type]


def program(name: str) -> Path:
    """Return a program of this environment."""
    return Path(sys.executable).parent / name


def model_path(model: str) -> str | Path:
    """Return where a model lies: a directory, else the pulled one of that name, else its name."""
    pulled = Path.home() / ".heedful" / "models" / model
    return pulled if pulled.is_dir() and not Path(model).is_dir() else model


def write_result(name: str, result: Mapping[str, Any], out: Path | None) -> Path:
    """Write a dated result with device, versions and command; return its path."""
    whole = {
        "benchmark": name,
        "command": " ".join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {item: metadata.version(item) for item in ("heedful", "torch", "transformers")},
        **result,
    }
    path = out or RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def say(text: str) -> None:
    """Write a line of progress."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def _wait_target(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Return the port that the server logged, or end with its log."""
    end_s = time.monotonic() + _READY_S
    while time.monotonic() < end_s and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}") and '"grpc"' in line:
                found = json.loads(line).get("grpc")
                if isinstance(found, str):
                    return found
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")

"""A real server with a tiny model, a policy version and a reward model, as a refresh leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import heedful
import pytest
from heedful_store import PolicyVersion, Role, Scope, Store, adapter_files
from heedful_trainer.config_sources import load

START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Served:
    """Where a server listens and keeps its files."""

    target: str
    home: Path


@pytest.fixture(scope="module")
def served(
    tiny_model_dir: Path,
    save_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A server that has v1 and r1 beside its base."""
    directory = tmp_path_factory.mktemp("server")
    log, home = directory / "log", directory / "home"
    command = [sys.executable, "-P", "-m", "heedful_server.main", "serve"]
    command += ["--model", str(tiny_model_dir), "--home", str(home)]
    command += ["--port", "0", "--http-port", "0", "--threads", "1"]
    command += ["--set", "engine.kv_cache_bytes=16777216"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEEDFUL_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, cwd=directory, env=environ)
    try:
        found = Served(_wait_target(process, log), home)
        with heedful.Client(found.target) as client:
            client.wait_ready(START_TIMEOUT_S)
            for role in ("policy", "reward"):
                heads = 2 if role == "reward" else 0
                publish(client, home, save_adapter(tiny_model_dir, heads=heads), role)
        yield found
    finally:
        process.terminate()
        process.wait(40)


def publish(client: heedful.Client, home: Path, adapter: Path, role: Role) -> None:
    """Publish an adapter as the trainer does, and wait until the server knows it."""
    base = client.list_models().base
    assert base is not None
    with Store(load(None, {}, home=home).place.store_url) as store:
        scope = Scope("local", client.project)
        version = store.next_version(scope, role)
        place = Path("policies") / scope.tenant / scope.project / version
        shutil.copytree(adapter, home / place)
        info = {
            "format": 1,
            "role": role,
            "base_id": base.base_id,
            "template_hash": base.template_hash,
            "base_model": base.name,
            "hidden_size": 64,
            "num_layers": 2,
            "run_id": "",
            "method": "dpo",
        }
        (home / place / adapter_files.INFO).write_text(json.dumps(info))
        content_hash = adapter_files.seal(home / place)
        row = PolicyVersion(
            scope=scope,
            version=version,
            content_hash=content_hash,
            base_id=base.base_id,
            template_hash=base.template_hash,
            role=role,
            path=str(place),
            manifest=dict(adapter_files.verify(home / place).files),
            method="dpo",
            verdict="inconclusive",
        )
        store.publish_policy(row).result()
    end_s = time.monotonic() + 20
    while client.list_models().find(version) is None:
        assert time.monotonic() < end_s, f"{version} does not appear"
        time.sleep(0.1)


def _wait_target(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}") and "grpc" in json.loads(line):
                return str(json.loads(line)["grpc"])
        time.sleep(0.05)
    pytest.fail(f"no open port\n{log.read_text(errors='replace')[-4000:]}")

"""Published versions, reward models and runs for the tests of the loop, over the toy engine."""

import json
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from heedful_proto.v1 import inference_pb2, models_pb2
from heedful_server.config import ServerConfig
from heedful_server.serving import Server
from heedful_store import PolicyVersion, Run, Scope, adapter_files, uuid7

SCOPE = Scope("local", "default")

Publish = Callable[..., Awaitable[PolicyVersion]]


def tensors(**shapes: tuple[int, ...]) -> bytes:
    """A safetensors file of float32 zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


@pytest.fixture
def config(config: ServerConfig) -> ServerConfig:
    """Versions stay what a test makes of them; test_canary.py turns this on again."""
    deployment = config.deployment.model_copy(update={"canary": False})
    return config.model_copy(update={"deployment": deployment})


@pytest.fixture
def write_adapter(server: Server) -> Callable[..., str]:
    """Write a sealed adapter directory of the served base; return its content hash."""

    def write(directory: Path, role: str = "policy", **info: object) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text('{"r": 2}')
        (directory / "adapter_model.safetensors").write_bytes(tensors(a=(2, 3)))
        if role == "reward":
            (directory / "reward_heads.safetensors").write_bytes(tensors(weight=(3, 3)))
        fields: dict[str, object] = {
            "format": 1,
            "role": role,
            "base_id": server.deployment.directory.base_id,
            "template_hash": server.deployment.directory.template_hash,
            "base_model": "byte-model",
            "hidden_size": 3,
            "num_layers": 1,
            # Makes the content of each one its own.
            "run_id": uuid7(),
            "method": "dpo",
        }
        (directory / "heedful.json").write_text(json.dumps(fields | info))
        return adapter_files.seal(directory)

    return write


@pytest.fixture
def publish(server: Server, config: ServerConfig, write_adapter: Callable[..., str]) -> Publish:
    """Publish a version as a trainer does: files, then the row."""

    async def run(role: str = "policy", scope: Scope = SCOPE, **fields: Any) -> PolicyVersion:
        store = server.feedback.store
        version = store.next_version(scope, role)
        path = f"policies/{scope.tenant}/{scope.project}/{version}"
        content_hash = write_adapter(config.home_dir / path, role)
        defaults = {
            "scope": scope,
            "version": version,
            "content_hash": content_hash,
            "base_id": server.deployment.directory.base_id,
            "template_hash": server.deployment.directory.template_hash,
            "role": role,
            "path": path,
            "method": "dpo",
            "verdict": "inconclusive",
        }
        return await store.publish_policy(PolicyVersion(**(defaults | fields)))

    return run


@pytest.fixture
def promote(models_stub) -> Callable[..., Awaitable[models_pb2.Deployment]]:
    async def run(version: str, **fields: object) -> models_pb2.Deployment:
        request = models_pb2.PromoteRequest(version=version, **fields)
        return (await models_stub.Promote(request)).deployment

    return run


@pytest.fixture
def roll_back(models_stub) -> Callable[..., Awaitable[models_pb2.Deployment]]:
    async def run(**fields: object) -> models_pb2.Deployment:
        return (await models_stub.RollBack(models_pb2.RollBackRequest(**fields))).deployment

    return run


@pytest.fixture
def generate(stub) -> Callable[..., Awaitable[inference_pb2.GenerateResponse]]:
    async def run(model: str = "", text: str = "abcd", **fields: object):
        max_tokens = fields.pop("max_tokens", 3)
        return await stub.Generate(
            inference_pb2.GenerateRequest(
                model=model,
                prompt=inference_pb2.Prompt(text=text),
                sampling=inference_pb2.SamplingParams(max_tokens=max_tokens),
                **fields,
            )
        )

    return run


@pytest.fixture
def listed(models_stub) -> Callable[..., Awaitable[tuple[dict, dict]]]:
    """Return versions by name and aliases."""

    async def run() -> tuple[dict[str, models_pb2.Model], dict[str, str]]:
        found = await models_stub.ListModels(models_pb2.ListModelsRequest())
        return {m.version: m for m in found.models}, {a.name: a.version for a in found.aliases}

    return run


@pytest.fixture
async def run_row(server: Server) -> Run:
    """A run of the default project that a worker holds."""
    store = server.feedback.store
    await store.create_run(Run(run_id=uuid7(), scope=SCOPE))
    run = await store.lease_run("worker", 60_000)
    assert run is not None
    return run

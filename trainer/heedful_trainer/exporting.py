"""Taking a version elsewhere: its adapter as PEFT reads it, or whole weights for transformers.

Owns what an export holds and that it appears whole or not at all. It publishes nothing and asks the
server only where the run's own note of its base is gone. One thread; blocks.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from heedful_store import NotFound, PolicyVersion, Scope, Store, adapter_files
from peft import PeftModel
from transformers import AutoModelForCausalLM

from heedful_trainer.base import Connect, find_base
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place
from heedful_trainer.errors import StageFailed

ExportFormat = Literal["peft", "merged"]

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".gguf", ".bin")


def find_scope(store: Store, tenant: str, project: str) -> Scope:
    """Return the project of a tenant; without a tenant, that of the only one who has it.

    Raises:
        NotFound: nobody has versions in a project of that name.
        StageFailed: several tenants have.
    """
    if tenant:
        return Scope(tenant, project)
    found = sorted({p.scope.tenant for p in store.find_policies() if p.scope.project == project})
    if not found:
        raise NotFound(f"a version of project {project}")
    if len(found) > 1:
        raise StageFailed(f"{', '.join(found)} have a project {project}; name one with --tenant")
    return Scope(found[0], project)


def find_version(store: Store, scope: Scope, name: str) -> PolicyVersion:
    """Return a version by its name or by an alias that points at it.

    Raises:
        NotFound: there is none; "base" has no adapter and so is none.
    """
    versions = {policy.version: policy for policy in store.find_policies(scope)}
    if name in versions:
        return versions[name]
    targets = {store.aliases(scope, p.base_id).get(name, "") for p in versions.values()}
    found = [versions[target] for target in targets if target in versions]
    if len(found) != 1:
        raise NotFound(f"version {name} of project {scope.project}")
    return found[0]


def export_version(
    policy: PolicyVersion,
    output: Path,
    format_: ExportFormat,
    config: TrainerConfig,
    place: Place,
    store: Store,
    connect: Connect,
) -> None:
    """Write a version to a directory that must not exist yet.

    Raises:
        StageFailed: the directory is there, or the version cannot be merged.
        AdapterDamaged: the version's files are not what was published.
        ModelUnusable: the base cannot be had.
    """
    if output.exists():
        raise StageFailed(f"{output} exists; an export writes a new directory")
    adapter = place.home / policy.path
    adapter_files.verify(adapter, policy.content_hash)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as directory:
        whole = Path(directory) / "export"
        if format_ == "peft":
            shutil.copytree(adapter, whole)
        else:
            if policy.role != "policy":
                raise StageFailed(f"{policy.version} is a {policy.role} model: only PEFT files")
            run_dir = place.home / "runs" / (policy.run_id or policy.version)
            base = find_base(config, place, store, policy.scope, run_dir, connect)
            _merge(base.directory, adapter, whole)
        whole.rename(output)


def _merge(base_dir: Path, adapter: Path, output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(base_dir), dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(output), safe_serialization=True)
    for file in base_dir.iterdir():
        is_weights = file.name.endswith(_WEIGHT_FILES)
        if file.is_file() and not is_weights and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)

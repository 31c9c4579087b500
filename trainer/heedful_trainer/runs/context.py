"""What every stage of a run has at hand.

Owns the run's directory and the model that its stages share; the model is loaded when a stage first
asks for it. It decides nothing. Training thread.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from heedful_store import Failpoints, Run, Store, adapter_files

from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.base import Base, Connect, find_base
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place
from heedful_trainer.dataset.examples import Example, read
from heedful_trainer.dataset.text import TextEncoder
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.runs.hooks import RunHooks
from heedful_trainer.runs.lease import RunLease

DATASET = "dataset.jsonl"


class RunContext:
    """One run in this process."""

    def __init__(
        self,
        store: Store,
        place: Place,
        config: TrainerConfig,
        lease: RunLease,
        hooks: RunHooks,
        connect: Connect,
        failpoints: Failpoints,
    ) -> None:
        self.store, self.place, self.config = store, place, config
        self.lease, self.hooks = lease, hooks
        self.connect, self.failpoints = connect, failpoints
        self.directory = run_directory(place.home, lease.run.run_id)

    @property
    def run(self) -> Run:
        """The run's row as last seen."""
        return self.lease.run

    @cached_property
    def base(self) -> Base:
        """The model that is trained on."""
        return find_base(
            self.config, self.place, self.store, self.run.scope, self.directory, self.connect
        )

    @cached_property
    def backbone(self) -> Backbone:
        """The same, loaded and adapted; reward model and policy take turns in it."""
        lora = self.config.lora
        options = BackboneOptions(
            self.base.dtype,
            lora.rank,
            lora.alpha,
            lora.trained_share,
            lora.trunk_cache_bytes,
            self.config.base.device,
        )
        return load_backbone(self.base.directory, options)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The base's tokenizer for what people wrote."""
        return TextEncoder(self.base.directory)

    @cached_property
    def scorer(self) -> PolicyScorer:
        """Log-probs under the backbone."""
        return PolicyScorer(self.backbone, self.encoder.eos_token_id)

    @cached_property
    def examples(self) -> list[Example]:
        """The run's dataset."""
        return read(self.directory / DATASET)

    def checkpoints(self, stage: str) -> CheckpointStore:
        """The checkpoints of a stage."""
        return CheckpointStore(self.directory / "checkpoints" / stage, self.failpoints)

    def adapter_dir(self, name: str) -> Path:
        """Where a stage leaves its adapter."""
        return self.directory / "adapters" / name

    def seal_adapter(self, name: str, temp: Path, role: str, method: str) -> str:
        """Complete an adapter directory, put it in place and return its content hash."""
        info = {
            "format": adapter_files.FORMAT,
            "role": role,
            "base_id": self.base.identity.base_id,
            "template_hash": self.base.identity.template_hash,
            "base_model": self.base.name,
            "hidden_size": self.backbone.hidden_size,
            "num_layers": self.backbone.num_layers,
            "run_id": self.run.run_id,
            "method": method,
        }
        (temp / adapter_files.INFO).write_text(json.dumps(info, sort_keys=True))
        # PEFT's own page about the adapter; the version's card is generated instead.
        (temp / "README.md").unlink(missing_ok=True)
        content_hash = adapter_files.seal(temp)
        final = self.adapter_dir(name)
        # What lies there is of an attempt that was killed before it was recorded.
        shutil.rmtree(final, ignore_errors=True)
        temp.rename(final)
        return content_hash

    def temp_adapter(self, name: str) -> Path:
        """Return an empty directory beside the adapters."""
        temp = self.directory / "adapters" / f".{name}"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        return temp

    def write_json(self, name: str, content: Mapping[str, Any] | list[Any]) -> Path:
        """Write a file of the report, whole or not at all."""
        path = self.directory / "report" / name
        write_whole(path, json.dumps(content, sort_keys=True, indent=1).encode())
        return path


def run_directory(home: Path, run_id: str) -> Path:
    """Return the directory of a run."""
    return home / "runs" / run_id


def write_whole(path: Path, content: bytes) -> None:
    """Write a file durably under another name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temp.rename(path)

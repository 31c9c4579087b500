"""Checkpoints of a training loop: safetensors and JSON, whole or not there.

Owns the files and what makes them trustworthy: written aside, flushed, renamed, with the SHA-256 of
the tensors inside. It does not know what the tensors mean. One thread; a kill at any moment leaves
the last whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from heedful_store import Failpoints
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

_TENSORS, _META = "state.safetensors", "state.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training loop between two steps."""

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]  # plain JSON: cursors, figures, hashes


class CheckpointStore:
    """The checkpoints of one stage, in one directory; the newest is kept."""

    def __init__(self, directory: Path, failpoints: Failpoints | None = None) -> None:
        self._directory = directory
        self._failpoints = failpoints or Failpoints()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably, then remove older ones."""
        self._directory.mkdir(parents=True, exist_ok=True)
        final = self._directory / f"step-{checkpoint.step:08d}"
        temp = final.with_suffix(".tmp")
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        save_file(dict(checkpoint.tensors), temp / _TENSORS)
        meta = {
            "format": _FORMAT,
            "step": checkpoint.step,
            "sha256": _sha256(temp / _TENSORS),
            "meta": checkpoint.meta,
        }
        (temp / _META).write_text(json.dumps(meta, sort_keys=True))
        for name in (_TENSORS, _META):
            _fsync(temp / name)
        self._failpoints.hit("trainer_checkpoint_written")
        # A step that is saved twice (a pause, then the interval) is the same state.
        shutil.rmtree(final, ignore_errors=True)
        temp.rename(final)
        _fsync(self._directory)
        for other in self._directory.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def load_newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None; damaged ones are passed over and logged.

        Starting earlier ends in the same weights, so that passing over costs only time.
        """
        if not self._directory.is_dir():
            return None
        for path in sorted(self._directory.glob("step-????????"), reverse=True):
            try:
                return _read(path)
            except (OSError, ValueError, KeyError) as error:
                structlog.get_logger().warning(
                    "checkpoint_passed_over", path=str(path), reason=str(error)
                )
        return None

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self._directory, ignore_errors=True)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.flatten().view(uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Checkpoint:
    meta = json.loads((path / _META).read_text())
    if meta["format"] != _FORMAT:
        raise ValueError(f"format {meta['format']}")
    if _sha256(path / _TENSORS) != meta["sha256"]:
        raise ValueError(f"{_TENSORS} does not match its SHA-256")
    return Checkpoint(meta["step"], load_file(path / _TENSORS), meta["meta"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

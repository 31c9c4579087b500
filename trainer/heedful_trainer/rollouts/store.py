"""Rollouts on disk: written aside, flushed, renamed, and only then learned from.

Owns the files of a run's rollouts: for each part of a plan one directory with ids and log-probs as
safetensors and the plan's settings as JSON. A part is whole or not there, so a killed run draws
only what is missing. They hold people's prompts: whoever owns the run removes them when it ends.
One writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from heedful_store import Failpoints
from safetensors.torch import load_file, save_file
from torch import Tensor

from heedful_trainer.errors import StageFailed
from heedful_trainer.rollouts.records import Ids, Plan, Rollout

_TENSORS, _META = "rollouts.safetensors", "rollouts.json"
_FORMAT = 1


class RolloutStore:
    """The rollouts of one run, below one directory."""

    def __init__(self, directory: Path, failpoints: Failpoints) -> None:
        self._directory, self._failpoints = directory, failpoints

    def save(self, plan: Plan, start: int, rollouts: Sequence[Rollout]) -> None:
        """Store a part durably; it begins at this prompt of the plan.

        Raises:
            StageFailed: the disk takes no more.
        """
        final = self._part(plan, start)
        temp = final.with_name(f".{final.name}")
        try:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
            save_file(_tensors(rollouts), temp / _TENSORS)
            meta = {**_settings(plan), "sha256": _sha256(temp / _TENSORS)}
            (temp / _META).write_text(json.dumps(meta, sort_keys=True))
            for path in (temp / _TENSORS, temp / _META, temp):
                _fsync(path)
            self._failpoints.hit("before_rollouts_rename")
            temp.rename(final)
            _fsync(final.parent)
        except OSError as error:
            shutil.rmtree(temp, ignore_errors=True)
            raise StageFailed(f"rollouts cannot be stored: {error}") from error
        self._failpoints.hit("rollouts_stored")

    def load(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout] | None:
        """Return a stored part; None where it is not there, damaged or of another plan."""
        path = self._part(plan, start)
        if not path.is_dir():
            return None
        try:
            found = _read(path, plan)
            wanted = [prompt for prompt in prompts for _ in range(plan.samples)]
            if [rollout.prompt for rollout in found] != wanted:
                raise ValueError("it answers other prompts")
        except (OSError, ValueError, KeyError) as error:
            structlog.get_logger().warning(
                "rollouts_drawn_again", path=str(path), reason=str(error)
            )
            shutil.rmtree(path, ignore_errors=True)
            return None
        return found

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _part(self, plan: Plan, start: int) -> Path:
        return self._directory / plan.name / f"part-{start:06d}"


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "plan": plan.name,
        "policy": plan.policy,
        "samples": plan.samples,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
        "temperature": 1.0,
    }


def _tensors(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    def flat(parts: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for part in parts for value in part], dtype=dtype)

    prompts, answers = [r.prompt for r in rollouts], [r.answer for r in rollouts]
    return {
        "prompt_ids": flat(prompts, torch.int64),
        "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
        "answer_ids": flat(answers, torch.int64),
        "answer_lengths": torch.tensor([len(ids) for ids in answers]),
        # fp64 holds what came over the wire to the bit.
        "logprobs": flat([r.logprobs for r in rollouts], torch.float64),
        "ended": torch.tensor([r.ended for r in rollouts]),
    }


def _read(path: Path, plan: Plan) -> list[Rollout]:
    meta = json.loads((path / _META).read_text())
    if {**_settings(plan), "sha256": meta["sha256"]} != meta:
        raise ValueError("it was drawn with other settings")
    if _sha256(path / _TENSORS) != meta["sha256"]:
        raise ValueError(f"{_TENSORS} does not match its SHA-256")
    tensors = load_file(path / _TENSORS)

    def split(name: str, lengths: str) -> list[tuple[Any, ...]]:
        return [tuple(p.tolist()) for p in tensors[name].split(tensors[lengths].tolist())]

    return [
        Rollout(*fields)
        for fields in zip(
            split("prompt_ids", "prompt_lengths"),
            split("answer_ids", "answer_lengths"),
            split("logprobs", "answer_lengths"),
            tensors["ended"].tolist(),
            strict=True,
        )
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

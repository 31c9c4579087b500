"""What can keep a refresh from ending in a policy, as typed errors.

Owns the exception tree below; str() is what a person reads in the run's row. It knows neither the
store's errors nor gRPC's. Raised in any thread of the trainer.

HeedfulTrainerError
├── InvalidConfig            the configuration breaks a rule
├── ModelUnusable            the base cannot be loaded or adapted
├── NotEnoughFeedback        below the least that a method needs (.missing says what)
├── TrainingFailed           losses stayed non-finite, or the state of a resumed run is wrong
│   └── CheckpointDamaged    a checkpoint's files do not match what they claim
├── RunStopped               somebody asked for the end; what was learned is saved
├── LeaseLost                another worker has the run
└── StageFailed              a stage cannot end (the server is gone, a file is missing)
"""
# ruff: noqa: N818 - the names say the condition

from __future__ import annotations

from collections.abc import Mapping


class HeedfulTrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class InvalidConfig(HeedfulTrainerError):
    """The configuration breaks a rule; the message names the setting."""


class ModelUnusable(HeedfulTrainerError):
    """The base model cannot be loaded or trained here."""


class NotEnoughFeedback(HeedfulTrainerError):
    """There is less than the method needs.

    Attributes:
        method: what was to be trained.
        missing: what is lacking, by kind: (there are, needed).
    """

    def __init__(self, method: str, missing: Mapping[str, tuple[int, int]], why: str = "") -> None:
        self.method = method
        self.missing = dict(missing)
        needs = ", ".join(f"{there} of {least} {kind}" for kind, (there, least) in missing.items())
        super().__init__(f"not enough feedback for {method}: {needs}{why and f' ({why})'}")


class TrainingFailed(HeedfulTrainerError):
    """Training cannot go on; the champion stays."""


class CheckpointDamaged(TrainingFailed):
    """A checkpoint's files do not match what they claim."""


class RunStopped(HeedfulTrainerError):
    """The run was asked to end, or used up its time; its last checkpoint is kept."""


class LeaseLost(HeedfulTrainerError):
    """Another worker holds the run now; nothing more may be written about it."""


class StageFailed(HeedfulTrainerError):
    """A stage cannot end for a reason outside the data."""

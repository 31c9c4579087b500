"""Policy versions, runs and deployments as callers see them: plain frozen dataclasses.

Owns the vocabulary of the loop; `types.py` owns that of completions, `feedback_types.py` that of
feedback. Knows neither gRPC nor how values travel. Pure, any thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias

Method: TypeAlias = Literal["auto", "sft", "dpo", "kto", "ppo_ptx"]
"""How a refresh trains; "auto" lets the data decide."""

RefreshAction: TypeAlias = Literal["pause", "resume", "stop"]
"""What can be asked of a run; "stop" ends it and keeps its last checkpoint."""

_OVER = ("failed", "stopped", "finished")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version; `state` is "candidate", "champion" and so on, `role` "policy" or "reward".

    `verdict` is what the gate found: "pass", "fail", "inconclusive" or empty.
    """

    version: str
    base_model: str
    state: str
    loaded: bool
    quantization: str
    context_tokens: int
    content_hash: str = ""
    parent_version: str = ""
    run_id: str = ""
    created: datetime | None = None
    role: str = ""
    verdict: str = ""
    method: str = ""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What every version of a project stands on; `path` is shown to the scope train only."""

    name: str
    base_id: str
    template_hash: str
    path: str
    quantize: str
    quantization: str
    kernel_path: str
    context_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Models:
    """Versions, newest first, the aliases that point at them, and what they stand on."""

    versions: tuple[ModelVersion, ...]
    aliases: Mapping[str, str]
    base: BaseModel | None = None

    def find(self, name: str) -> ModelVersion | None:
        """Returns the version that a name or alias stands for, None where there is none."""
        version = self.aliases.get(name, name)
        return next((item for item in self.versions if item.version == version), None)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One version with its card (Markdown) and the evidence of its run and its gate."""

    model: ModelVersion
    text: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One entry of the append-only deployment log.

    `action` is "publish", "canary", "promote", "reject" or "roll_back"; `verdict` is "proven",
    "approved" or "rolled back".
    """

    seq: int
    action: str
    alias: str
    from_version: str
    to_version: str
    verdict: str = ""
    reason: str = ""
    actor: str = ""
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Refresh:
    """A run and where it stands.

    `status` is "queued", "running", "paused", "failed", "stopped" or "finished";
    `stage_progress` is the share of the stage that is done, `figures` its loss, accuracy and so on;
    `evidence` holds what each finished stage found.
    """

    run_id: str
    status: str
    stage: str
    kind: str = "refresh"
    method: str = "auto"
    stage_progress: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    candidate_version: str = ""
    verdict: str = ""
    error: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """True where nothing more will happen."""
        return self.status in _OVER


@dataclass(frozen=True, slots=True)
class RunAdapter:
    """An adapter of a run that is not published: a directory `name` below the run's own."""

    run_id: str
    name: str

    @property
    def model(self) -> str:
        """What `generate` and `score` call it."""
        return f"run:{self.run_id}/{self.name}"


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is: sequences that are admitted."""

    num_interactive: int
    num_background: int

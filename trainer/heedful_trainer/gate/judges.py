"""Who says which of two answers is better: the protocol between the gate and its judges.

Owns no judge; the run's reward model and the one on another backbone (`evaluation`) satisfy it.
The gate reads each judge once, with all answers together, so that nothing can be tuned on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from heedful_trainer.gate.types import GatePrompt

JudgeKind: TypeAlias = Literal["reward_model", "other_backbone"]


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """An answer as a judge sees it; which policy gave it is withheld."""

    prompt: GatePrompt
    text: str
    token_ids: tuple[int, ...]
    ended: bool


class Judge(Protocol):
    """Gives answers a number; higher is better."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def kind(self) -> JudgeKind:
        """`reward_model` is what was trained against; `other_backbone` shares nothing with it."""
        ...

    @property
    def tie_width(self) -> float:
        """Differences up to this count as a tie."""
        ...

    def score(self, answers: Sequence[JudgedAnswer]) -> Sequence[float]:
        """Return one number for each answer; called once, from a worker thread."""
        ...

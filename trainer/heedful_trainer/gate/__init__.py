"""The gate: whether a candidate may become champion, with its evidence."""

from heedful_trainer.gate.explain import explain
from heedful_trainer.gate.judges import Judge, JudgedAnswer, JudgeKind
from heedful_trainer.gate.must_pass import MustPassError
from heedful_trainer.gate.run import run_gate, run_gate_on_server
from heedful_trainer.gate.sampler import Answer, Draw, Sampler, ServerSampler
from heedful_trainer.gate.settings import GateSettings
from heedful_trainer.gate.suspects import suspicious_phrases
from heedful_trainer.gate.types import (
    CanaryEvidence,
    Check,
    FeedbackCounts,
    GateInputs,
    GatePrompt,
    GateReport,
    HoldoutPair,
    StageResult,
    TriggerPhrase,
)

__all__ = [
    "Answer",
    "CanaryEvidence",
    "Check",
    "Draw",
    "FeedbackCounts",
    "GateInputs",
    "GatePrompt",
    "GateReport",
    "GateSettings",
    "HoldoutPair",
    "Judge",
    "JudgeKind",
    "JudgedAnswer",
    "MustPassError",
    "Sampler",
    "ServerSampler",
    "StageResult",
    "TriggerPhrase",
    "explain",
    "run_gate",
    "run_gate_on_server",
    "suspicious_phrases",
]

"""A judge on another backbone: it shares nothing with the reward model that was trained against."""

from heedful_trainer.evaluation.sentence_judge import (
    JudgePair,
    JudgeUnavailable,
    SentenceJudge,
    fit_sentence_judge,
)
from heedful_trainer.evaluation.sentences import SentenceEncoder, find_sentence_model

__all__ = [
    "JudgePair",
    "JudgeUnavailable",
    "SentenceEncoder",
    "SentenceJudge",
    "find_sentence_model",
    "fit_sentence_judge",
]

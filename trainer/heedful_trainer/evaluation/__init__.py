"""How good a policy is: the gate's judge on another backbone, and the evaluation of a version.

The judge shares nothing with the reward model that was trained against. The evaluation is a program
of its own (`command`); nothing of it is imported here.
"""

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

"""The frozen judge: a ridge-penalised preference head on sentence embeddings of prompt and answer.

Owns its features, its fit and whether it is fit to judge at all: by cross-validation over prompts
it must order pairs better than chance, else there is no judge and the reason is said. It is fitted
before any candidate is seen, on a split of its own, and never afterwards. Pure apart from the
encoder; one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from heedful_trainer.evaluation.sentences import (
    DISTRIBUTION,
    SentenceEncoder,
    find_sentence_model,
)
from heedful_trainer.gate.judges import JudgedAnswer, JudgeKind
from heedful_trainer.gate.statistics import Paired, outcome_of, paired

_RIDGES = (0.03, 0.3, 3.0, 30.0)
_FOLDS = 5
_MIN_PAIRS = 40
_LEVEL = 0.05
_RESAMPLES = 2000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JudgePair:
    """A judged pair of the judge's own split."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class JudgeUnavailable:
    """Why there is no judge on another backbone."""

    reason: str


class SentenceJudge:
    """Scores answers by a linear head on embeddings; satisfies the gate's `Judge`."""

    def __init__(self, encoder: SentenceEncoder, head: Array, accuracy: Paired) -> None:
        self._encoder = encoder
        self._head = head
        self.accuracy = accuracy
        """By cross-validation over prompts, on the judge's own split."""

    @property
    def name(self) -> str:
        """For people."""
        return "MiniLM"

    @property
    def kind(self) -> JudgeKind:
        """Shares nothing with the reward model."""
        return "other_backbone"

    @property
    def tie_width(self) -> float:
        """Scores are continuous: only equal ones tie."""
        return 0.0

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return one number an answer; higher is better."""
        prompts = [_last_turn(answer) for answer in answers]
        features = _features(self._encoder, prompts, [answer.text for answer in answers])
        return [float(value) for value in features @ self._head]


def fit_sentence_judge(
    pairs: Sequence[JudgePair], encoder: SentenceEncoder | None = None
) -> SentenceJudge | JudgeUnavailable:
    """Return the judge of some pairs, or why there is none.

    Args:
        pairs: of a split that neither reward model nor policy was trained on.
        encoder: default: the installed one.
    """
    if len(pairs) < _MIN_PAIRS:
        return JudgeUnavailable(f"n too small: {len(pairs)} pairs, {_MIN_PAIRS} are needed")
    if encoder is None:
        directory = find_sentence_model()
        if directory is None:
            return JudgeUnavailable(f"the package {DISTRIBUTION} is not installed")
        encoder = SentenceEncoder(directory)
    prompts = [pair.prompt for pair in pairs]
    chosen = _features(encoder, prompts, [pair.chosen for pair in pairs])
    differences = chosen - _features(encoder, prompts, [pair.rejected for pair in pairs])
    ridge, margins = _cross_validate(differences, prompts)
    outcomes = [outcome_of(float(margin), 0.0) for margin in margins]
    found = paired(prompts, outcomes, confidence=0.95, resamples=_RESAMPLES)
    if found.p_better > _LEVEL:
        return JudgeUnavailable(
            f"it orders its own pairs no better than chance: {found.value:.0%} of {found.n}"
        )
    return SentenceJudge(encoder, _fit(differences, ridge), found)


def _last_turn(answer: JudgedAnswer) -> str:
    return answer.prompt.messages[-1][1] if answer.prompt.messages else ""


def _features(encoder: SentenceEncoder, prompts: Sequence[str], answers: Sequence[str]) -> Array:
    """Return what the answer says, and how that agrees with what was asked."""
    said, asked = encoder.encode(answers), encoder.encode(prompts)
    return np.concatenate([said, said * asked * np.sqrt(said.shape[1])], axis=1)


def _cross_validate(differences: Array, prompts: Sequence[str]) -> tuple[float, Array]:
    """Return the ridge of the least held-out loss, and its held-out margins."""
    numbers = {prompt: idx for idx, prompt in enumerate(dict.fromkeys(prompts))}
    folds = np.array([numbers[prompt] % _FOLDS for prompt in prompts])
    found = []
    for ridge in _RIDGES:
        margins = np.zeros(len(differences))
        for fold in range(_FOLDS):
            held_out = folds == fold
            if held_out.any() and not held_out.all():
                margins[held_out] = differences[held_out] @ _fit(differences[~held_out], ridge)
        found.append((float(np.logaddexp(0.0, -margins).mean()), ridge, margins))
    _, ridge, margins = min(found, key=lambda item: item[0])
    return ridge, margins


def _fit(differences: Array, ridge: float) -> Array:
    """Return the head that minimises the Bradley-Terry loss plus the ridge on its weights."""

    def loss(weights: Array) -> tuple[float, Array]:
        margins = differences @ weights
        value = np.logaddexp(0.0, -margins).sum() + ridge * (weights @ weights) / 2
        share = np.exp(-np.logaddexp(0.0, margins))  # of the vote that is not explained yet
        return float(value), ridge * weights - differences.T @ share

    start = np.zeros(differences.shape[1])
    return np.asarray(optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x)

"""SFT on what people wrote: corrections and demonstrations.

Owns the objective. The loss is the mean over the tokens of each answer, so that a batch's step does
not depend on how long its texts are. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from heedful_trainer.dataset.builders import Group, written_by_people
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.packing import Row

_EVALUATED_ROWS = 8


class SftObjective:
    """Supervised fine-tuning."""

    def __init__(
        self,
        scorer: PolicyScorer,
        parameters: Mapping[str, nn.Parameter],
        train: Sequence[Group],
        validation: Sequence[Group],
    ) -> None:
        self._scorer = scorer
        self._parameters = dict(parameters)
        self._train, self._validation = _rows(train), _rows(validation)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        return [row.num_tokens for row in self._train]

    @property
    def rows(self) -> list[Row]:
        """Every row that will be computed."""
        return [*self._train, *self._validation]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the adapter."""
        return self._parameters

    def begin_step(self, batch: Sequence[int]) -> None:
        """Nothing depends on the whole batch."""

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over rows of the mean over their tokens."""
        scores = self._scorer.policy([self._train[i] for i in examples])
        return (-scores.total_A / scores.length_A).sum(), {}

    def evaluate(self) -> Mapping[str, float]:
        """Return the loss for each token of the validation part, of policy and reference."""
        policy_sum, reference_sum, tokens = 0.0, 0.0, 0.0
        with torch.no_grad():
            for start in range(0, len(self._validation), _EVALUATED_ROWS):
                rows = self._validation[start : start + _EVALUATED_ROWS]
                policy, reference = self._scorer.policy(rows), self._scorer.reference(rows)
                policy_sum -= float(policy.total_A.sum())
                reference_sum -= float(reference.total_A.sum())
                tokens += float(policy.length_A.sum())
        if not tokens:
            return {}
        loss = policy_sum / tokens
        return {
            "loss": loss,
            "n": float(len(self._validation)),
            "lm_loss": loss,
            "lm_loss_reference": reference_sum / tokens,
        }


def _rows(groups: Sequence[Group]) -> list[Row]:
    found = []
    for group in groups:
        answers = group.row.answers
        wanted = dict.fromkeys(written_by_people(group))
        found += [Row(group.prompt, (answers[index],)) for index in wanted]
    return found

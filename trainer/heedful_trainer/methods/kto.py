"""KTO on thumbs: which answers a batch holds, its reference point, and the loss.

Owns the objective. The reference point z0 comes from each prompt paired with the answer of the
batch's next one, for the whole batch of a step. Answers that were cut have no end token, so that
liking one teaches nothing about ending; disliking one that ended leaves its end token out. One
thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heedful_trainer import losses
from heedful_trainer.config import KtoSettings
from heedful_trainer.dataset.builders import Group, thumbs_of
from heedful_trainer.methods.scores import PolicyScorer, Scores
from heedful_trainer.packing import Row

_EVALUATED_ROWS = 8


@dataclass(frozen=True, slots=True)
class _Example:
    row: Row  # one prompt, one answer
    up: bool


class KtoObjective:
    """Kahneman-Tversky optimisation."""

    def __init__(
        self,
        scorer: PolicyScorer,
        parameters: Mapping[str, nn.Parameter],
        settings: KtoSettings,
        train: Sequence[Group],
        validation: Sequence[Group],
        *,
        with_orders: bool,
    ) -> None:
        self._scorer, self._settings = scorer, settings
        self._parameters = dict(parameters)
        self._train = _examples(train, with_orders)
        self._validation = _examples(validation, with_orders)
        ups = sum(example.up for example in self._train)
        self._weights = losses.kto_weights(ups, len(self._train) - ups)
        self._point = torch.zeros(())

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        return [example.row.num_tokens for example in self._train]

    @property
    def rows(self) -> list[Row]:
        """Every row that will be computed, without the mismatched ones."""
        return [example.row for example in (*self._train, *self._validation)]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the adapter."""
        return self._parameters

    def begin_step(self, batch: Sequence[int]) -> None:
        """Estimate the reference point from mismatched pairs of this batch."""
        self._point = self._reference_point([self._train[i] for i in batch])

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the answers' losses."""
        chosen = [self._train[i] for i in examples]
        rows = [example.row for example in chosen]
        policy, reference = self._scorer.policy(rows), self._scorer.reference(rows)
        loss_B = self._losses(policy, reference, chosen, self._point)
        return loss_B.sum(), {"kl_estimate": float(self._point) * len(chosen)}

    def evaluate(self) -> Mapping[str, float]:
        """Return loss and accuracy (liked answers moved up, others down) on the validation part."""
        if not self._validation:
            return {}
        total, right, tokens = 0.0, 0.0, 0.0
        sums = {"lm_loss": 0.0, "lm_loss_reference": 0.0}
        with torch.no_grad():
            point = self._reference_point(self._validation)
            for start in range(0, len(self._validation), _EVALUATED_ROWS):
                part = self._validation[start : start + _EVALUATED_ROWS]
                rows = [example.row for example in part]
                policy, reference = self._scorer.policy(rows), self._scorer.reference(rows)
                total += float(self._losses(policy, reference, part, point).sum())
                up = _ups(part)
                moved = policy.total_A - reference.total_A - point
                right += float(((moved > 0) == up).sum())
                tokens += float(policy.length_A[up].sum())
                sums["lm_loss"] -= float(policy.total_A[up].sum())
                sums["lm_loss_reference"] -= float(reference.total_A[up].sum())
        n = len(self._validation)
        means = {name: value / max(tokens, 1.0) for name, value in sums.items()}
        return {"loss": total / n, "n": float(n), "accuracy": right / n, **means}

    def _losses(
        self, policy: Scores, reference: Scores, examples: Sequence[_Example], point: Tensor
    ) -> Tensor:
        up = _ups(examples)
        desirable, undesirable = self._weights
        return losses.kto_loss(
            torch.where(up, policy.total_A, policy.body_A),
            torch.where(up, reference.total_A, reference.body_A),
            up,
            point,
            beta=self._settings.beta,
            desirable_weight=desirable,
            undesirable_weight=undesirable,
        )

    def _reference_point(self, examples: Sequence[_Example]) -> Tensor:
        if len(examples) < 2:
            return torch.zeros(())
        shifted = [*examples[1:], examples[0]]
        rows = [
            Row(one.row.prompt, other.row.answers)
            for one, other in zip(examples, shifted, strict=True)
        ]
        policy, reference = [], []
        with torch.no_grad():
            for start in range(0, len(rows), _EVALUATED_ROWS):
                part = rows[start : start + _EVALUATED_ROWS]
                policy.append(self._scorer.policy(part).total_A)
                reference.append(self._scorer.reference(part).total_A)
        return losses.kto_reference_point(torch.cat(policy), torch.cat(reference))


def _examples(groups: Sequence[Group], with_orders: bool) -> list[_Example]:
    found = []
    for group in groups:
        answers = group.row.answers
        for index, up in thumbs_of(group, with_orders=with_orders):
            found.append(_Example(Row(group.prompt, (answers[index],)), up))
    return found


def _ups(examples: Sequence[_Example]) -> Tensor:
    return torch.tensor([example.up for example in examples])

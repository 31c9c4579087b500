"""The start of InstructGPT's RL (Ouyang et al. 2022, C.3): demonstrations with some plain text.

Owns the objective of that supervised training. It is neither the SFT baseline of C.1 nor its
checkpoint: two epochs on demonstrations, mixed with 10 % language-model text, and the result is
both where PPO starts and what its KL is measured from. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from heedful_trainer.dataset.builders import Group, written_by_people
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.packing import Row
from heedful_trainer.rollouts.records import Ids


class RlInitObjective:
    """Supervised training on what people wrote, with texts among it."""

    def __init__(
        self, scorer: PolicyScorer, parameters: Mapping[str, nn.Parameter], rows: Sequence[Row]
    ) -> None:
        self._scorer, self._parameters, self._rows = scorer, dict(parameters), list(rows)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        return [row.num_tokens for row in self._rows]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the adapter."""
        return self._parameters

    def begin_step(self, batch: Sequence[int]) -> None:
        """Nothing depends on the whole batch."""

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum over rows of the mean over their tokens."""
        scores = self._scorer.policy([self._rows[i] for i in examples])
        return (-scores.total_A / scores.length_A).sum(), {}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is chosen here: the last state is taken, as in the paper."""
        return {}


def mixed_rows(groups: Sequence[Group], texts: Sequence[Ids], text_share: float) -> list[Row]:
    """Return demonstrations and corrections with so large a share of texts among the rows."""
    written = [
        Row(group.prompt, (group.row.answers[index],))
        for group in groups
        for index in dict.fromkeys(written_by_people(group))
    ]
    count = round(len(written) * text_share / (1 - text_share)) if texts else 0
    chosen = [texts[i % len(texts)] for i in range(count)]
    return [*written, *(Row(ids[:1], (ids[1:],)) for ids in chosen)]

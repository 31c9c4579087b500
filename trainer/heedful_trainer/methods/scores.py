"""Log-probs of whole answers under the policy and under the reference.

Owns how token log-probs become what the losses take, with the guard against never ending: an
answer's end token is kept apart, so that it can be left out. The reference is the base itself (the
adapter off), computed once for each row. One thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful_trainer import losses
from heedful_trainer.backbone import Backbone, Batch
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.packing import Row


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the tokens of A answers, in nats."""

    total_A: Tensor  # with the end token
    end_A: Tensor  # the end token's part; 0 where the answer was cut
    ended_A: Tensor  # true where the answer ended of itself
    length_A: Tensor  # tokens

    @property
    def body_A(self) -> Tensor:  # noqa: N802 - carries its shape
        """Without the end token."""
        return self.total_A - self.end_A


class PolicyScorer:
    """Scores rows by one backbone, as policy and as reference."""

    def __init__(self, backbone: Backbone, eos_token_id: int) -> None:
        self._backbone = backbone
        self.eos_token_id = eos_token_id
        self._reference: dict[Row, Scores] = {}

    def policy(self, rows: Sequence[Row]) -> Scores:
        """Return the scores with the adapter, with gradients unless they are off."""
        return self._score(self._backbone.batch(rows), with_adapter=True)

    def reference(self, rows: Sequence[Row]) -> Scores:
        """Return the scores of the base; kept from the first time on.

        Each row is computed alone, so that its value does not depend on its neighbours.
        """
        found = [self._reference_of(row) for row in rows]
        return Scores(
            torch.cat([scores.total_A for scores in found]),
            torch.cat([scores.end_A for scores in found]),
            torch.cat([scores.ended_A for scores in found]),
            torch.cat([scores.length_A for scores in found]),
        )

    def prepare(self, rows: Sequence[Row], hooks: Hooks) -> None:
        """Compute trunks and references ahead, giving way in between."""
        for done, row in enumerate(rows, 1):
            self._reference_of(row)
            hooks.breathe()
            hooks.report(0.0, {"prepared_share": done / len(rows)}, 0)

    def divergence(self, rows: Sequence[Row]) -> Tensor:
        """Return KL(policy ‖ reference) of each answer: the sum over its positions, in nats."""
        found = []
        with torch.no_grad():
            for row in rows:
                batch = self._backbone.batch([row])
                packed = batch.packed
                policy = self._backbone.hidden(batch)
                reference = self._backbone.hidden(batch, with_adapter=False)
                kl_N = self._backbone.answer_kl(batch, policy, reference)
                found.append(losses.segment_logprobs(kl_N, packed.owner_N, packed.num_answers))
        return torch.cat(found) if found else torch.zeros(0)

    def _reference_of(self, row: Row) -> Scores:
        kept = self._reference.get(row)
        if kept is None:
            with torch.no_grad():
                kept = self._score(self._backbone.batch([row]), with_adapter=False)
            self._reference[row] = kept
        return kept

    def _score(self, batch: Batch, *, with_adapter: bool) -> Scores:
        packed = batch.packed
        hidden = self._backbone.hidden(batch, with_adapter=with_adapter)
        logprobs_N = self._backbone.answer_logprobs(batch, hidden)
        ended_A = packed.target_N[packed.last_target_A] == self.eos_token_id
        last_A = logprobs_N[packed.last_target_A]
        return Scores(
            losses.segment_logprobs(logprobs_N, packed.owner_N, packed.num_answers),
            torch.where(ended_A, last_A, torch.zeros_like(last_A)),
            ended_A,
            packed.length_A,
        )

"""DPO on rankings and pairs: which pairs a batch holds, and their loss.

Owns the objective. The guard against never ending: where the preferred answer was cut at its length
and the other one ended, the other's end token is left out of its log-prob, so that nothing is
learned against ending. For itself that would teach every policy to end early, whatever the taste;
so of a preferred end only as much counts as ended answers were preferred to cut ones more often
than the other way round. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heedful_trainer import losses
from heedful_trainer.config import DpoSettings
from heedful_trainer.dataset.builders import Group, Pair, pairs_of
from heedful_trainer.methods.scores import PolicyScorer, Scores
from heedful_trainer.packing import Row

_EVALUATED_ROWS = 8  # at once


@dataclass(frozen=True, slots=True)
class _Example:
    row: Row
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probs of P pairs under policy and reference, as the loss takes them."""

    first_P: Tensor
    second_P: Tensor
    reference_first_P: Tensor
    reference_second_P: Tensor

    @property
    def margin_P(self) -> Tensor:  # noqa: N802 - carries its shape
        """How much more than the reference the policy prefers the first, in nats."""
        return losses.dpo_margin(
            self.first_P, self.second_P, self.reference_first_P, self.reference_second_P
        )


class DpoObjective:
    """Direct preference optimisation.

    Attributes:
        end_share: how much of its end token counts for an answer preferred to one that was cut.
    """

    def __init__(
        self,
        scorer: PolicyScorer,
        parameters: Mapping[str, nn.Parameter],
        settings: DpoSettings,
        train: Sequence[Group],
        validation: Sequence[Group],
    ) -> None:
        self._scorer, self._settings = scorer, settings
        self._parameters = dict(parameters)
        self._train = _fewer_ties(_examples(train, settings))
        self._validation = _examples(validation, settings)
        self.end_share = _end_share(self._train, scorer.eos_token_id)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        return [example.row.num_tokens for example in self._train]

    @property
    def rows(self) -> list[Row]:
        """Every row that will be computed."""
        return [example.row for example in (*self._train, *self._validation)]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the adapter."""
        return self._parameters

    def begin_step(self, batch: Sequence[int]) -> None:
        """Nothing depends on the whole batch."""

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the rows' losses."""
        chosen = [self._train[i] for i in examples]
        rows = [example.row for example in chosen]
        policy, reference = self._scorer.policy(rows), self._scorer.reference(rows)
        pairs = _placed(chosen)
        scores = pair_scores(
            policy,
            reference,
            pairs,
            length_normalised=self._settings.length_normalised,
            end_share=self.end_share,
        )
        loss = self._pair_loss(scores.margin_P, pairs)
        if self._settings.sft_weight:
            loss = loss + self._settings.sft_weight * _negative_loglikelihood(policy, pairs)
        return loss, _figures(scores.margin_P.detach(), pairs, self._settings.beta, len(rows))

    def evaluate(self) -> Mapping[str, float]:
        """Return loss, accuracy and log-likelihoods on the validation part."""
        total, weight, figures = 0.0, 0.0, dict[str, float]()
        with torch.no_grad():
            for start in range(0, len(self._validation), _EVALUATED_ROWS):
                part = self._validation[start : start + _EVALUATED_ROWS]
                rows = [example.row for example in part]
                policy, reference = self._scorer.policy(rows), self._scorer.reference(rows)
                pairs = _placed(part)
                scores = pair_scores(
                    policy, reference, pairs, length_normalised=False, end_share=self.end_share
                )
                total += float(self._pair_loss(scores.margin_P, pairs))
                weight += sum(pair.weight for pair in pairs)
                for name, value in _evaluation(policy, reference, scores, pairs).items():
                    figures[name] = figures.get(name, 0.0) + value
        return _as_means(figures, total / weight) if weight else {}

    def _pair_loss(self, margin_P: Tensor, pairs: Sequence[Pair]) -> Tensor:
        loss_P = losses.dpo_loss(
            margin_P,
            beta=self._settings.beta,
            target_B=_column(pairs, "target"),
            label_smoothing=self._settings.label_smoothing,
        )
        return (loss_P * _column(pairs, "weight")).sum()


def pair_scores(
    policy: Scores,
    reference: Scores,
    pairs: Sequence[Pair],
    *,
    length_normalised: bool,
    end_share: float = 1.0,
) -> PairScores:
    """Return the log-probs of pairs, with the guard on end tokens; optionally for each token.

    Args:
        policy: scores of the pairs' answers.
        reference: the same under the reference.
        pairs: of these answers.
        length_normalised: whether log-probs are divided by the answer's length.
        end_share: how much of its end token counts for an answer preferred to one that was cut.
    """
    first, second = _index(pairs, "first"), _index(pairs, "second")
    decided = _column(pairs, "target") > 0.5
    ended_first, ended_second = policy.ended_A[first], policy.ended_A[second]
    # Preferred but cut, against one that ended: the end must not be what is disliked.
    unfair = decided & ~ended_first & ended_second
    partly = decided & ended_first & ~ended_second

    def both(scores: Scores) -> tuple[Tensor, Tensor]:
        a, b = scores.total_A[first], scores.total_A[second]
        a = torch.where(partly, scores.body_A[first] + end_share * scores.end_A[first], a)
        b = torch.where(unfair, scores.body_A[second], b)
        if length_normalised:
            a, b = a / scores.length_A[first], b / scores.length_A[second]
        return a, b

    (a, b), (reference_a, reference_b) = both(policy), both(reference)
    return PairScores(a, b, reference_a, reference_b)


def _end_share(examples: Sequence[_Example], eos_token_id: int) -> float:
    """Return how much oftener "ended" was preferred to "cut" than the reverse, as a share."""
    for_ending, against = 0, 0
    for example in examples:
        ended = [ids[-1:] == (eos_token_id,) for ids in example.row.answers]
        for pair in example.pairs:
            if pair.target > 0.5 and ended[pair.first] != ended[pair.second]:
                for_ending += ended[pair.first]
                against += ended[pair.second]
    return max(0, for_ending - against) / for_ending if for_ending else 1.0


def _examples(groups: Sequence[Group], settings: DpoSettings) -> list[_Example]:
    found = ((group.row, tuple(pairs_of(group, settings))) for group in groups)
    return [_Example(row, pairs) for row, pairs in found if pairs]


def _fewer_ties(examples: Sequence[_Example]) -> list[_Example]:
    """Return the examples with no more rows of ties alone than of decided pairs, evenly chosen.

    Where raters mostly see no difference, their ties would take most of the time and say little.
    """
    is_tied = [all(pair.target == 0.5 for pair in example.pairs) for example in examples]
    num_tied = sum(is_tied)
    allowed = len(examples) - num_tied
    if num_tied <= allowed:
        return list(examples)
    kept, seen = [], 0
    for example, tied in zip(examples, is_tied, strict=True):
        if not tied:
            kept.append(example)
            continue
        seen += 1
        if seen * allowed // num_tied > (seen - 1) * allowed // num_tied:
            kept.append(example)
    return kept


def _placed(examples: Sequence[_Example]) -> list[Pair]:
    """Return the pairs of several rows, numbered as their answers are when packed together."""
    pairs: list[Pair] = []
    start = 0
    for example in examples:
        pairs += [
            Pair(start + pair.first, start + pair.second, pair.target, pair.weight)
            for pair in example.pairs
        ]
        start += len(example.row.answers)
    return pairs


def _negative_loglikelihood(policy: Scores, pairs: Sequence[Pair]) -> Tensor:
    preferred = [pair for pair in pairs if pair.target > 0.5]
    first = _index(preferred, "first")
    each = -policy.total_A[first] / policy.length_A[first]
    return (each * _column(preferred, "weight")).sum()


def _figures(
    margin_P: Tensor, pairs: Sequence[Pair], beta: float, num_rows: int
) -> dict[str, float]:
    """Return means over the decided pairs, times the rows: the loop divides by its rows."""
    decided = [i for i, pair in enumerate(pairs) if pair.target != 0.5]
    if not decided:
        return {}
    margins = margin_P[decided]
    return {
        "accuracy": float((margins > 0).float().mean()) * num_rows,
        "reward_margin": float(beta * margins.mean()) * num_rows,
    }


def _evaluation(
    policy: Scores, reference: Scores, scores: PairScores, pairs: Sequence[Pair]
) -> dict[str, float]:
    decided = [i for i, pair in enumerate(pairs) if pair.target != 0.5]
    won = scores.margin_P[decided]
    preferred = _index([pairs[i] for i in decided], "first")
    other = _index([pairs[i] for i in decided], "second")
    tokens = float(policy.length_A[preferred].sum())
    return {
        "n": float(len(decided)),
        "accuracy": float((won > 0).sum() + 0.5 * (won == 0).sum()),
        "margin_nats": float(won.sum()),
        "chosen_logratio": float((policy.total_A - reference.total_A)[preferred].sum()),
        "rejected_logratio": float((policy.total_A - reference.total_A)[other].sum()),
        "lm_tokens": tokens,
        "lm_loss": -float(policy.total_A[preferred].sum()),
        "lm_loss_reference": -float(reference.total_A[preferred].sum()),
    }


def _as_means(sums: Mapping[str, float], loss: float) -> dict[str, float]:
    n, tokens = max(sums["n"], 1.0), max(sums["lm_tokens"], 1.0)
    means = {"loss": loss, "n": sums["n"]}
    for name in ("accuracy", "margin_nats", "chosen_logratio", "rejected_logratio"):
        means[name] = sums[name] / n
    for name in ("lm_loss", "lm_loss_reference"):
        means[name] = sums[name] / tokens
    return means


def _index(pairs: Sequence[Pair], end: str) -> Tensor:
    return torch.tensor([p.first if end == "first" else p.second for p in pairs], dtype=torch.long)


def _column(pairs: Sequence[Pair], name: str) -> Tensor:
    return torch.tensor([p.target if name == "target" else p.weight for p in pairs])

"""Where a reward model's heads start: the best linear reward on hidden states of the frozen base.

Owns a convex fit: every judgement is a logistic loss of something linear in the heads, and an L2
penalty, chosen by cross-validation over prompts, keeps them from learning wrong labels by heart.
Training goes on from there (Kumar et al. 2022, https://arxiv.org/abs/2202.10054: a trunk that is
trained under random heads forgets more than it learns). It knows no training loop. One thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful_trainer.config import RewardSettings
from heedful_trainer.dataset.builders import Group
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.reward.model import RewardModel, pooled
from heedful_trainer.reward.pairs import pairs_of_order

_PENALTIES = (1.0, 3.0, 10.0, 30.0)
_CAUTIOUS = 10.0  # where there is too little to choose by
_FOLDS = 4
_FEWEST_JUDGED = 16  # prompts, to choose a penalty by
_MOST_ITERATIONS = 100


@dataclass(frozen=True, slots=True)
class Judgements:
    """J judgements of G prompts as logistic examples over H features."""

    vector_JH: Tensor  # what the heads are multiplied with
    bar_J: Tensor  # 1 where the rater's bar is subtracted from the reward, else 0
    outcome_J: Tensor  # probability of "better" that was seen: 1, 0, or ½ for a tie
    weight_J: Tensor
    prompt_J: Tensor

    def of(self, chosen_J: Tensor) -> Judgements:
        """Return some of them."""
        return Judgements(
            self.vector_JH[chosen_J],
            self.bar_J[chosen_J],
            self.outcome_J[chosen_J],
            self.weight_J[chosen_J],
            self.prompt_J[chosen_J],
        )


def start_heads(
    model: RewardModel,
    groups: Sequence[Group],
    settings: RewardSettings,
    bootstrap_GE: Tensor,
    hooks: Hooks,
) -> tuple[float, float]:
    """Give every head its best start on its own bootstrap; return the penalty and the raters' bar.

    The mean answer has a reward of 0 then.

    Args:
        model: its adapter is not used, its heads are set.
        groups: judged prompts to learn from.
        settings: weights of the kinds of judgement.
        bootstrap_GE: weight of each prompt for each head.
        hooks: given way to after each row.
    """
    features = _features(model, groups, hooks)
    middle_H = torch.cat(features).mean(0)
    judged = judgements_of(groups, [feature - middle_H for feature in features], settings)
    scale_H = judged.vector_JH.square().mean(0).sqrt().clamp(min=1e-6)
    judged = replace(judged, vector_JH=judged.vector_JH / scale_H)
    penalty = _choose_penalty(judged)
    weights_JE = judged.weight_J[:, None] * bootstrap_GE.double()[judged.prompt_J]
    scaled_EH, bar_E = fit(judged, weights_JE, penalty)
    heads_EH = scaled_EH / scale_H
    with torch.no_grad():
        model.heads.weight.copy_(heads_EH)
        model.heads.bias.copy_(-heads_EH @ middle_H)
    return penalty, float(bar_E.mean())


def judgements_of(
    groups: Sequence[Group], features: Sequence[Tensor], settings: RewardSettings
) -> Judgements:
    """Return what people said as logistic examples, weighted as the training objective does.

    A correction's margin is left out.

    Args:
        groups: of G prompts.
        features: of each prompt's answers, fp64, [K, H]; their mean over all is 0.
        settings: weights.
    """
    found: list[tuple[Tensor, float, float, float, int]] = []
    for number, (group, feature_KH) in enumerate(zip(groups, features, strict=True)):
        total = len(group.orders) + len(group.all_bad) + len(group.corrections)
        total += bool(group.thumbs)
        for vector, bar, outcome, weight in _said(group, feature_KH, settings):
            found.append((vector, bar, outcome, weight / total, number))
    numbers_J4 = torch.tensor([numbers for _, *numbers in found], dtype=torch.float64)
    bar_J, outcome_J, weight_J, prompt_J = numbers_J4.unbind(1)
    vector_JH = torch.stack([vector for vector, *_ in found])
    return Judgements(vector_JH, bar_J, outcome_J, weight_J, prompt_J.long())


def fit(judged: Judgements, weights_JE: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return E heads [E, H] and bars [E] of least penalised loss.

    ``Σ_j w_je BCE(σ(x_j · W_e − b_j τ_e), y_j) / Σ_j w_je + λ/2 ‖W_e‖²``, by L-BFGS in fp64.
    """
    shares_JE = weights_JE / weights_JE.sum(0)
    heads_EH = torch.zeros(
        weights_JE.shape[1], judged.vector_JH.shape[1], dtype=torch.float64, requires_grad=True
    )
    bar_E = torch.zeros(weights_JE.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [heads_EH, bar_E],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (shares_JE * _losses(judged, heads_EH, bar_E)).sum()
        loss = loss + penalty / 2 * heads_EH.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return heads_EH.detach(), bar_E.detach()


def _losses(judged: Judgements, heads_EH: Tensor, bar_E: Tensor) -> Tensor:
    z_JE = judged.vector_JH @ heads_EH.T - judged.bar_J[:, None] * bar_E
    outcome_JE = judged.outcome_J[:, None].expand_as(z_JE)
    return F.binary_cross_entropy_with_logits(z_JE, outcome_JE, reduction="none")


def _choose_penalty(judged: Judgements) -> float:
    """Return the penalty whose fit on some prompts predicts the others best."""
    if len(set(judged.prompt_J.tolist())) < _FEWEST_JUDGED:
        return _CAUTIOUS
    losses = dict.fromkeys(_PENALTIES, 0.0)
    for fold in range(_FOLDS):
        is_left_out_J = judged.prompt_J % _FOLDS == fold
        left_out, others = judged.of(is_left_out_J), judged.of(~is_left_out_J)
        for penalty in _PENALTIES:
            heads_EH, bar_E = fit(others, others.weight_J[:, None], penalty)
            loss_J = _losses(left_out, heads_EH, bar_E)[:, 0]
            losses[penalty] += float((left_out.weight_J * loss_J).sum())
    return min(losses, key=lambda penalty: losses[penalty])


def _features(model: RewardModel, groups: Sequence[Group], hooks: Hooks) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for number, group in enumerate(groups, 1):
            batch = model.backbone.batch([group.row])
            hidden = model.backbone.hidden(batch, with_adapter=False)
            found.append(pooled(hidden, batch.packed).double())
            hooks.breathe()
            hooks.report(0.0, {"prepared_share": number / len(groups)}, 0)
    return found


def _said(
    group: Group, feature_KH: Tensor, settings: RewardSettings
) -> Iterator[tuple[Tensor, float, float, float]]:
    """Yield vector, whether the bar counts, outcome and weight of all that one prompt got."""
    for order in group.orders:
        pairs = [p for p in pairs_of_order(order) if p[2] != 0.5 or not settings.drop_ties]
        for first, second, outcome in pairs:
            yield feature_KH[first] - feature_KH[second], 0.0, outcome, 1 / len(pairs)
    for bad in group.all_bad:
        for answer in bad:
            yield feature_KH[answer], 1.0, 0.0, 1 / len(bad)
    ups = [up for _, up in group.thumbs]
    rated_KH = feature_KH[[answer for answer, _ in group.thumbs]]
    for vector, up in zip(rated_KH, ups, strict=True):
        # As the loss has it: siblings that disagree are compared with their mean.
        siblings = len(set(ups)) == 2
        weight = settings.thumb_weight / len(ups)
        yield (vector - rated_KH.mean(0) if siblings else vector), float(not siblings), up, weight
    for item in group.corrections:
        vector = feature_KH[item.corrected] - feature_KH[item.served]
        yield vector, 0.0, 1.0, settings.correction_weight

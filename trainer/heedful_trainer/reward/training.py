"""Training a reward model: rankings, thumbs, corrections and "all bad" in one objective.

Owns the objective, the bootstrap of the heads, and what follows training: the shift that gives
demonstrations mean 0, and the temperature. All judgements about one prompt are one example, and its
answers are computed once. One thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from heedful_store import Failpoints
from torch import Tensor, nn

from heedful_trainer import reward_losses
from heedful_trainer.backbone import Backbone
from heedful_trainer.calibration import calibrated_loss, fit_temperature
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import RewardSettings, TrainerConfig
from heedful_trainer.dataset.builders import Group, counts
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.methods.loop import LoopResult, LoopSettings, train
from heedful_trainer.packing import Row
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.reward.pairs import pair_differences, pairs_of_groups
from heedful_trainer.reward.start import start_heads

_MIN_JUDGEMENTS = 8
# Fewer decided pairs than this say more about chance than about temperature.
MIN_CALIBRATION_PAIRS = 10
_EVALUATED_ROWS = 8
_CENTRED_PROMPTS = 64  # at most: a mean needs no more, and each is computed


class RewardObjective:
    """Everything that people said, as one loss over prompts."""

    def __init__(
        self,
        model: RewardModel,
        settings: RewardSettings,
        train: Sequence[Group],
        validation: Sequence[Group],
        seed: int,
    ) -> None:
        self._model, self._settings = model, settings
        self._train = [group for group in train if _is_judged(group)]
        self._validation = [group for group in validation if _is_judged(group)]
        found = counts(self._train)
        num_ties = 0 if settings.drop_ties else found["ties"]
        log_nu = reward_losses.initial_log_nu(num_ties, num_ties + found["pairs"])
        self._log_nu = None if log_nu is None else nn.Parameter(torch.tensor(log_nu))
        self._intercept = nn.Parameter(torch.zeros(()))
        num_heads = model.heads.weight.shape[0]
        self._bootstrap_GE = _bootstrap(len(self._train), num_heads, seed)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        return [group.row.num_tokens for group in self._train]

    @property
    def log_nu(self) -> float | None:
        """How common ties are; None without any."""
        return None if self._log_nu is None else float(self._log_nu.detach())

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return trunk, heads, tie and thumb parameters."""
        more = {"intercept": self._intercept}
        if self._log_nu is not None:
            more["log_nu"] = self._log_nu
        return {**self._model.parameters(), **more}

    def start(self, hooks: Hooks) -> None:
        """Give heads and intercept their start."""
        _, bar = start_heads(self._model, self._train, self._settings, self._bootstrap_GE, hooks)
        with torch.no_grad():
            self._intercept.fill_(bar)

    def begin_step(self, batch: Sequence[int]) -> None:
        """Nothing depends on the whole batch."""

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the prompts' losses, each head on its own bootstrap."""
        groups = [self._train[i] for i in examples]
        total, figures = torch.zeros(()), {"accuracy": 0.0}
        for index, group, rewards in zip(examples, groups, self._rewards(groups), strict=True):
            weight_E = self._bootstrap_GE[index]
            total = total + (self._group_loss(group, rewards) * weight_E).mean()
            figures["accuracy"] += _accuracy(group, rewards.detach().mean(1))
        return total, figures

    def evaluate(self) -> Mapping[str, float]:
        """Return loss and pair accuracy of the mean reward on the validation part.

        Where there are pairs enough, it is the loss at the temperature that suits them, since one
        is fitted after training: what a model tells apart decides when to stop, not how sure it is.
        """
        raw, accuracy = 0.0, 0.0
        scored: dict[Row, list[list[float]]] = {}
        with torch.no_grad():
            for start in range(0, len(self._validation), _EVALUATED_ROWS):
                part = self._validation[start : start + _EVALUATED_ROWS]
                for group, rewards in zip(part, self._rewards(part), strict=True):
                    mean = rewards.mean(1, keepdim=True)
                    scored[group.row] = mean.tolist()
                    raw += float(self._group_loss(group, mean).mean())
                    accuracy += _accuracy(group, mean[:, 0])
        n = len(self._validation)
        if not n:
            return {}
        pairs = pairs_of_groups(self._validation, scored)
        loss = raw / n
        if len(pairs) >= MIN_CALIBRATION_PAIRS:
            outcomes = [pair.outcome for pair in pairs]
            loss = calibrated_loss([pair.difference for pair in pairs], outcomes)
        return {"loss": loss, "raw_loss": raw / n, "accuracy": accuracy / n, "n": float(n)}

    def _rewards(self, groups: Sequence[Group]) -> Sequence[Tensor]:
        rows = [group.row for group in groups]
        return torch.split(self._model.rewards(rows), [len(row.answers) for row in rows])

    def _group_loss(self, group: Group, rewards_KE: Tensor) -> Tensor:
        """Return one prompt's loss for each head: a mean over its judgements."""
        settings = self._settings
        found = [
            reward_losses.ranking_loss(
                rewards_KE[list(order.answers)],
                torch.tensor(order.ranks),
                self._log_nu,
                drop_ties=settings.drop_ties,
            )
            for order in group.orders
        ]
        found += [
            reward_losses.all_bad_loss(rewards_KE[list(bad)], self._intercept)
            for bad in group.all_bad
        ]
        if group.thumbs:
            answers, ups = zip(*group.thumbs, strict=True)
            thumbs = reward_losses.thumb_loss(
                rewards_KE[list(answers)],
                torch.tensor(ups),
                torch.zeros(len(ups), dtype=torch.long),
                self._intercept,
            )
            found.append(settings.thumb_weight * thumbs.mean(0))
        found += [
            settings.correction_weight
            * reward_losses.correction_loss(
                rewards_KE[item.corrected], rewards_KE[item.served], item.edit_distance
            )
            for item in group.corrections
        ]
        centre = settings.centre_weight * rewards_KE.mean(0).square()
        return torch.stack(found).mean(0) + centre


@dataclass(frozen=True, slots=True)
class RewardResult:
    """A trained reward model and how it came about."""

    model: RewardModel
    loop: LoopResult
    log_nu: float | None
    calibration_pairs: int  # behind the temperature; too few leave it at 1


def train_reward(
    backbone: Backbone,
    parts: Mapping[str, Sequence[Group]],
    config: TrainerConfig,
    checkpoints: CheckpointStore,
    hooks: Hooks,
    failpoints: Failpoints,
) -> RewardResult:
    """Train a reward model from scratch; the backbone's adapter holds its trunk afterwards.

    Raises:
        NotEnoughFeedback: the training part says too little.
        TrainingFailed, RunStopped: of the loop.
    """
    settings = config.reward
    require_judgements(parts["train"])
    backbone.adapter.reset(config.run.seed + 1)
    heads = Heads(settings.heads, backbone.hidden_size)
    model = RewardModel(backbone, heads)
    objective = RewardObjective(
        model, settings, parts["train"], parts["validation"], config.run.seed
    )
    if checkpoints.load_newest() is None:  # else it holds what the start became
        objective.start(hooks)
    loop = LoopSettings(
        epochs=settings.epochs,
        seed=config.run.seed,
        optimiser=settings.optimiser,
        checkpoint_s=config.run.checkpoint_s,
        compute_cap_s=config.run.compute_cap_s,
        evaluations=settings.evaluations,
        patience=settings.patience,
        look_first=True,
    )
    result = train(objective, loop, checkpoints, hooks, failpoints)
    _shift_to_zero(model, parts["train"])
    differences, outcomes = pair_differences(model, parts["calibration"])
    enough = len(differences) >= MIN_CALIBRATION_PAIRS
    heads.temperature = fit_temperature(differences, outcomes) if enough else 1.0
    return RewardResult(model, result, objective.log_nu, len(differences))


def require_judgements(train: Sequence[Group]) -> None:
    """Raise NotEnoughFeedback unless there is something to learn a reward from."""
    there = counts(train)
    judgements = there["pairs"] + there["thumbs"] + there["corrections"]
    if judgements < _MIN_JUDGEMENTS:
        raise NotEnoughFeedback(
            "a reward model",
            {"decided pairs, thumbs or corrections": (judgements, _MIN_JUDGEMENTS)},
        )


def _shift_to_zero(model: RewardModel, train: Sequence[Group]) -> None:
    shown = [
        Row(group.prompt, (group.row.answers[index],))
        for group in train
        for index in group.demonstrations
    ]
    stride = -(-len(train) // _CENTRED_PROMPTS)
    rewards = model.score(shown or [group.row for group in train[::stride]])
    with torch.no_grad():
        model.heads.bias.sub_(reward_losses.mean_zero_shift(rewards))


def _bootstrap(num_groups: int, num_heads: int, seed: int) -> Tensor:
    """Return exponential weights of mean 1 (Rubin's bootstrap); one head alone sees all alike."""
    if num_heads == 1:
        return torch.ones(num_groups, 1)
    generator = torch.Generator().manual_seed(seed + 3)
    uniform = torch.rand(num_groups, num_heads, generator=generator)
    return -torch.log1p(-uniform)


def _is_judged(group: Group) -> bool:
    return bool(group.orders or group.all_bad or group.thumbs or group.corrections)


def _accuracy(group: Group, reward_K: Tensor) -> float:
    """Return the share of a prompt's decided pairs that are in order; half where there is none."""
    right, n = 0.0, 0
    for order in group.orders:
        for a in range(len(order.ranks)):
            for b in range(a + 1, len(order.ranks)):
                sign = order.ranks[b] - order.ranks[a]
                if sign:
                    difference = reward_K[order.answers[a]] - reward_K[order.answers[b]]
                    right += float(difference * sign > 0)
                    n += 1
    return right / n if n else 0.5

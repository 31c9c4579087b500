"""The one training loop: batches in a fixed order, AdamW, checkpoints, early stopping.

Owns steps, schedule, gradient accumulation, the skipping of steps that are not finite, and the
state that makes a killed run end in the same weights: order and schedule follow from seed and step,
so the state is parameters, moments, step, best and counts. What is learned is the objective's
matter. One thread; the number of compute threads must not change within a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from heedful_store import Failpoints
from torch import Tensor, nn

from heedful_trainer.checkpoint import Checkpoint, CheckpointStore, hash_of
from heedful_trainer.config import OptimiserSettings
from heedful_trainer.errors import CheckpointDamaged, RunStopped, TrainingFailed
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.packing import cut

_BETAS = (0.9, 0.95)  # InstructGPT's
# To reach the least number of steps. With eight, twenty pairs were learned by heart, and the policy
# left the language for it.
_MOST_EPOCHS = 4


class Objective(Protocol):
    """What is learned from which examples."""

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each example."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained, by name."""
        ...

    def begin_step(self, batch: Sequence[int]) -> None:
        """Prepare what depends on the whole batch of a step."""
        ...

    def loss(self, examples: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the examples' losses, and sums of figures to show."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Return figures on the validation part; "loss" decides, empty without examples."""
        ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How long and how an objective is trained."""

    epochs: float
    seed: int
    optimiser: OptimiserSettings
    checkpoint_s: float
    compute_cap_s: float = 0.0  # 0: none
    evaluations: int = 0  # for each epoch; 0: only at the end
    patience: int = 0  # evaluations without a better loss before the end; 0: no early stop
    look_first: bool = False  # whether the start is looked at too, and kept where nothing is better


@dataclass(slots=True)
class _State:
    step: int = 0
    bad_steps: int = 0  # in a row
    skipped: int = 0  # in all
    seconds: float = 0.0  # of training
    tokens: int = 0
    waits: int = 0  # evaluations without a better loss
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What a training came to; the objective's parameters hold the best state."""

    steps: int
    skipped_steps: int
    seconds: float
    tokens: int
    ended: str  # "epochs", "patience" or "compute_cap"
    history: list[dict[str, float]]


def train(
    objective: Objective,
    settings: LoopSettings,
    checkpoints: CheckpointStore,
    hooks: Hooks,
    failpoints: Failpoints,
) -> LoopResult:
    """Train an objective from its present parameters, or go on from the newest checkpoint.

    Raises:
        TrainingFailed: losses stayed non-finite.
        RunStopped: hooks asked for the end; a checkpoint was saved.
    """
    loop = _Loop(objective, settings, checkpoints, hooks)
    loop.resume()
    if settings.look_first and loop.state.step == 0:
        loop.evaluate()
    ended = "epochs"
    while loop.state.step < loop.num_steps:
        loop.step()
        failpoints.hit("trainer_step")
        if loop.evaluate_if_due():
            ended = "patience"
            break
        if 0 < settings.compute_cap_s <= loop.state.seconds:
            ended = "compute_cap"
            break
        loop.save_if_due()
        loop.obey()
    loop.take_best()
    state = loop.state
    return LoopResult(
        state.step, state.skipped, state.seconds, state.tokens, ended, list(state.history)
    )


class _Loop:
    def __init__(
        self,
        objective: Objective,
        settings: LoopSettings,
        checkpoints: CheckpointStore,
        hooks: Hooks,
    ) -> None:
        self._objective, self._settings = objective, settings
        self._checkpoints, self._hooks = checkpoints, hooks
        self._parameters = dict(sorted(objective.parameters().items()))
        options = settings.optimiser
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(),
            lr=options.learning_rate,
            betas=_BETAS,
            weight_decay=options.weight_decay,
            foreach=False,
        )
        num_examples = len(objective.sizes)
        self._per_epoch = math.ceil(num_examples / options.batch_size)
        asked = math.ceil(settings.epochs * self._per_epoch)
        # Three steps over twenty pairs would leave the policy where it was.
        least = min(options.min_steps, _MOST_EPOCHS * self._per_epoch)
        self.num_steps = max(1, asked, least)
        looks = settings.evaluations
        self._evaluate_every = max(1, self._per_epoch // looks) if looks else 0
        self.state = _State()
        self._saved_at = time.monotonic()

    def step(self) -> None:
        started = time.monotonic()
        batch = self._batch(self.state.step)
        self._objective.begin_step(batch)
        total, sums = 0.0, dict[str, float]()
        for micro in self._micro_batches(batch):
            loss, figures = self._objective.loss(micro)
            if loss.requires_grad:
                (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / len(batch)
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value / len(batch)
            self.state.tokens += sum(self._objective.sizes[i] for i in micro)
            self.state.seconds += time.monotonic() - started
            self._hooks.breathe()
            started = time.monotonic()
        norm = float(self._apply(total))
        self.state.step += 1
        self.state.seconds += time.monotonic() - started
        self._report({"loss": total, "gradient_norm": norm, **sums})

    def _apply(self, loss: float) -> float:
        values = list(self._parameters.values())
        norm = float(nn.utils.clip_grad_norm_(values, self._settings.optimiser.clip_norm))
        state = self.state
        if math.isfinite(loss) and math.isfinite(norm):
            self._optimiser.param_groups[0]["lr"] = self._learning_rate(state.step)
            self._optimiser.step()
            state.bad_steps = 0
        else:
            state.bad_steps += 1
            state.skipped += 1
        self._optimiser.zero_grad(set_to_none=True)
        if state.bad_steps >= self._settings.optimiser.max_bad_steps:
            raise TrainingFailed(
                f"the loss was not finite in {state.bad_steps} steps in a row (step {state.step})"
            )
        return norm

    def evaluate_if_due(self) -> bool:
        """Look at the validation part; return whether training should end."""
        state = self.state
        is_last = state.step == self.num_steps
        due = self._evaluate_every > 0 and state.step % self._evaluate_every == 0
        return self.evaluate() if due or is_last else False

    def evaluate(self) -> bool:
        state = self.state
        found = dict(self._objective.evaluate())
        if not found:
            return False
        state.history.append({"step": float(state.step), **found})
        self._report({f"validation_{name}": value for name, value in found.items()})
        if not self._settings.patience:
            return False
        if found["loss"] < state.best_loss:
            state.best_loss, state.waits = found["loss"], 0
            state.best = {n: p.detach().clone() for n, p in self._parameters.items()}
        else:
            state.waits += 1
        return state.waits >= self._settings.patience

    def take_best(self) -> None:
        with torch.no_grad():
            for name, value in self.state.best.items():
                self._parameters[name].copy_(value)

    def obey(self) -> None:
        wanted = self._hooks.wanted()
        if wanted == "go":
            return
        self._save()
        if wanted == "stop":
            raise RunStopped(f"stopped at step {self.state.step} of {self.num_steps}")
        self._hooks.wait_while_paused()

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved_at >= self._settings.checkpoint_s:
            self._save()

    def _save(self) -> None:
        state, moments = self.state, self._moments()
        tensors = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"moment.{name}": value for name, value in moments.items()}
        tensors |= {f"best.{name}": value for name, value in state.best.items()}
        # Nothing in the loop draws from it today; a dropout of tomorrow would.
        tensors["rng"] = torch.get_rng_state()
        meta: dict[str, Any] = {
            "optimiser_sha256": hash_of(moments),
            "bad_steps": state.bad_steps,
            "skipped": state.skipped,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "waits": state.waits,
            "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
            "history": state.history,
        }
        self._checkpoints.save(Checkpoint(state.step, tensors, meta))
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Take the newest checkpoint's state, if there is one."""
        checkpoint = self._checkpoints.load_newest()
        if checkpoint is None:
            return
        tensors, meta = checkpoint.tensors, checkpoint.meta
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        self._set_moments(tensors)
        if hash_of(self._moments()) != meta["optimiser_sha256"]:
            raise CheckpointDamaged(f"step {checkpoint.step}: the optimiser's state did not arrive")
        torch.set_rng_state(tensors["rng"])
        best = meta["best_loss"]
        self.state = _State(
            step=checkpoint.step,
            bad_steps=meta["bad_steps"],
            skipped=meta["skipped"],
            seconds=meta["seconds"],
            tokens=meta["tokens"],
            waits=meta["waits"],
            best_loss=math.inf if best is None else best,
            history=list(meta["history"]),
            best={n: tensors[f"best.{n}"] for n in self._parameters if f"best.{n}" in tensors},
        )

    def _moments(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def _set_moments(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"moment.{key}.{name}")
                if value is not None:
                    self._optimiser.state[parameter][key] = value.clone()

    def _batch(self, step: int) -> list[int]:
        epoch, within = divmod(step, self._per_epoch)
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._objective.sizes), generator=generator).tolist()
        size = self._settings.optimiser.batch_size
        return order[within * size : (within + 1) * size]

    def _micro_batches(self, batch: Sequence[int]) -> list[list[int]]:
        sizes = [self._objective.sizes[example] for example in batch]
        groups = cut(sizes, self._settings.optimiser.micro_batch_tokens)
        return [[batch[i] for i in group] for group in groups]

    def _learning_rate(self, step: int) -> float:
        options = self._settings.optimiser
        warmup = options.warmup_share * self.num_steps
        if step < warmup:
            return options.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1.0, self.num_steps - warmup)
        low = options.final_share
        return options.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)

    def _report(self, figures: Mapping[str, float]) -> None:
        state = self.state
        rate = state.tokens / state.seconds if state.seconds else 0.0
        shown = {**figures, "tokens_per_second": rate, "skipped_steps": float(state.skipped)}
        self._hooks.report(state.step / self.num_steps, shown, state.step)

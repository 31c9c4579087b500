"""One step of PPO-ptx: policy and text in one step of Adam, the value function in its own.

Owns both optimisers, their learning rates, and what is done with a step that is not finite. The
losses are `ppo_losses`, how the two gradients meet is `ptx`. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heedful_trainer import ppo_losses, ptx
from heedful_trainer.backbone import Batch
from heedful_trainer.methods.hooks import Hooks
from heedful_trainer.ppo.experience import Experience
from heedful_trainer.ppo.networks import Networks, Parameters
from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.ptx import PtxWeight

# Adam as the summarisation papers run it: the larger ε tames the first, badly scaled steps
# (Huang et al. 2024, "The N implementation details", on PyTorch's and TensorFlow's Adam).
_BETAS, _EPSILON = (0.9, 0.95), 1e-5
_WARMUP_START = 0.1


class Updater:
    """The two optimisers.

    Attributes:
        bad_steps: steps in a row that were skipped because something was not finite.
        skipped: such steps in all.
    """

    def __init__(self, networks: Networks, settings: PpoSettings) -> None:
        self._networks, self._settings = networks, settings
        self._policy = dict(sorted(networks.policy.items()))
        self._value = dict(sorted(networks.value.items()))
        self._optimisers = {
            "policy": _adam(self._policy, settings.policy_learning_rate),
            "value": _adam(self._value, settings.value_learning_rate),
        }
        table = settings.ptx
        self._ptx = (
            PtxWeight(table.ratio, 0.0, table.gamma)
            if table.weight == "ratio"
            else PtxWeight(None, table.gamma)
        )
        self.bad_steps = self.skipped = 0

    def step(
        self,
        minibatch: Sequence[Experience],
        texts: Sequence[Batch],
        iteration: int,
        hooks: Hooks,
    ) -> Mapping[str, float]:
        """Learn from one minibatch; return its figures."""
        figures = self._value_step(minibatch, iteration, hooks)
        learning = iteration - self._settings.value_only_iterations
        if learning >= 0:
            figures |= self._policy_step(minibatch, texts, learning, hooks)
        if all(math.isfinite(value) for value in figures.values()):
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.skipped += 1
        return figures

    def state(self) -> dict[str, Tensor]:
        """Return both optimisers' moments, by name."""
        found: dict[str, Tensor] = {}
        for kind, parameters in (("policy", self._policy), ("value", self._value)):
            for name, parameter in parameters.items():
                for key, value in self._optimisers[kind].state.get(parameter, {}).items():
                    found[f"{kind}.{key}.{name}"] = value
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the moments of ``state``."""
        for kind, parameters in (("policy", self._policy), ("value", self._value)):
            for name, parameter in parameters.items():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors.get(f"{kind}.{key}.{name}")
                    if value is not None:
                        self._optimisers[kind].state[parameter][key] = value.clone()

    @property
    def wants_text(self) -> bool:
        """False where ptx is off."""
        return not self._ptx.is_off and self._settings.ptx.texts_per_episode > 0

    def _policy_step(
        self, minibatch: Sequence[Experience], texts: Sequence[Batch], learning: int, hooks: Hooks
    ) -> dict[str, float]:
        """Accumulate PPO's gradient and the text's, then take one step."""
        figures = self._policy_gradient(minibatch, hooks)
        ppo = ptx.take_gradients(self._policy)
        figures |= self._text_gradient(texts, hooks)
        text = ptx.take_gradients(self._policy)
        ppo_norm, ptx_norm = ptx.global_norm(ppo), ptx.global_norm(text)
        coefficient = self._ptx.coefficient(ppo_norm, ptx_norm) if texts else 0.0
        ptx.accumulate(self._policy, ppo, text, coefficient)
        norm = self._apply("policy", self._policy, self._rate(learning))
        return figures | {
            "gradient_norm": norm,
            "ppo_norm": ppo_norm,
            "ptx_norm": ptx_norm,
            "ptx_coefficient": coefficient,
        }

    def _policy_gradient(self, minibatch: Sequence[Experience], hooks: Hooks) -> dict[str, float]:
        num_tokens = sum(part.num_tokens for part in minibatch)
        total = clipped = 0.0
        for part in minibatch:
            logprobs = self._networks.policy_logprobs(part.batch)
            losses = ppo_losses.policy_losses(
                logprobs,
                part.old_N,
                part.advantages_N,
                clip=self._settings.clip,
                weights=part.weights_N,
            )
            (losses.sum() / num_tokens).backward()  # type: ignore[no-untyped-call]
            total += float(losses.detach().sum()) / num_tokens
            share = ppo_losses.clipped_share(
                logprobs.detach(), part.old_N, part.advantages_N, clip=self._settings.clip
            )
            clipped += float(share) * part.num_tokens / num_tokens
            hooks.breathe()
        return {"policy_loss": total, "clipped_share": clipped}

    def _text_gradient(self, texts: Sequence[Batch], hooks: Hooks) -> dict[str, float]:
        num_tokens = sum(int(batch.packed.target_N.shape[0]) for batch in texts)
        total = 0.0
        for batch in texts:
            loss = ptx.ptx_loss(self._networks.policy_logprobs(batch), num_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            hooks.breathe()
        return {"ptx_loss": total} if texts else {}

    def _value_step(
        self, minibatch: Sequence[Experience], iteration: int, hooks: Hooks
    ) -> dict[str, float]:
        num_tokens = sum(part.num_tokens for part in minibatch)
        total = 0.0
        for part in minibatch:
            losses = ppo_losses.value_losses(
                self._networks.values(part.batch),
                part.old_values_N,
                part.returns_N,
                clip=self._settings.value_clip or None,
            )
            (losses.sum() / num_tokens).backward()  # type: ignore[no-untyped-call]
            total += float(losses.detach().sum()) / num_tokens
            hooks.breathe()
        norm = self._apply("value", self._value, self._rate(iteration))
        return {"value_loss": total, "value_gradient_norm": norm}

    def _apply(self, kind: str, parameters: Parameters, share: float) -> float:
        """Step where all is finite, and skip where it is not; return the gradient's norm."""
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), self._settings.clip_norm))
        optimiser = self._optimisers[kind]
        if math.isfinite(norm):
            optimiser.param_groups[0]["lr"] = share * optimiser.defaults["lr"]
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return norm

    def _rate(self, iteration: int) -> float:
        """Return the share of the peak: from a tenth, linear, then constant (C.4)."""
        warmup = self._settings.warmup_iterations
        done = min(1.0, iteration / warmup) if warmup else 1.0
        return _WARMUP_START + (1 - _WARMUP_START) * done


def _adam(parameters: Mapping[str, nn.Parameter], rate: float) -> Any:
    return torch.optim.Adam(parameters.values(), lr=rate, betas=_BETAS, eps=_EPSILON, foreach=False)

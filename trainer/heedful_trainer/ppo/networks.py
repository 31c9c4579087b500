"""Policy, reference, value function and reward model on one backbone.

Owns which adapter the backbone wears for which of the four, and the value head. They differ only in
the adapted layers on top; what lies below is computed once for a batch and serves all (the batch
carries it). The reference is the base, without an adapter, or the adapter that training starts
from. The value function starts as a copy of the reward model, its head as the mean of the reward's
heads, or as the one head that is the reward alone. One thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heedful_trainer.backbone import Backbone, Batch
from heedful_trainer.packing import Packed
from heedful_trainer.ppo.settings import Reading
from heedful_trainer.reward.model import Heads, RewardModel, pooled

Parameters = Mapping[str, nn.Parameter]


class Networks:
    """The four networks of PPO.

    Attributes:
        policy: what is trained, by the names of the adapter's file.
        value: adapter and head of the value function, by name.
        num_heads: E of the reward model.
    """

    def __init__(
        self, reward_model: RewardModel, seed: int, start: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the reward model out of its backbone, where the policy begins anew.

        Args:
            reward_model: its backbone wears its adapter.
            seed: of the policy's adapter.
            start: the adapter that the policy starts from, which is then the reference too; the
                base where it is absent.
        """
        self.backbone: Backbone = reward_model.backbone
        self._adapter = self.backbone.adapter
        trained = self._adapter.parameters()
        self._reward = _frozen(trained)
        self._heads: Heads = reward_model.heads
        self.num_heads = int(self._heads.weight.shape[0])
        self._value_adapter = {
            name: nn.Parameter(parameter.detach().clone()) for name, parameter in trained.items()
        }
        self._value_weight_H = nn.Parameter(self._heads.weight.detach().mean(0))
        self._value_bias = nn.Parameter(self._heads.bias.detach().mean())
        self.value: Parameters = {
            **self._value_adapter,
            "head.weight": self._value_weight_H,
            "head.bias": self._value_bias,
        }
        self._adapter.reset(seed)
        self._start: Parameters | None = None
        if start is not None:
            self._adapter.load(start)
            self._start = _frozen(start)
        self.policy: Parameters = trained
        self._worn: Parameters = trained

    def start_values(self, reading: Reading) -> None:
        """Make the value function predict this reading of the heads; before anything is folded."""
        # The least is another head for each answer, so that no one head predicts it. Their mean is
        # the honest start: too high by the gap between mean and least, which is then learned.
        if reading == "single":
            with torch.no_grad():
                self._value_weight_H.copy_(self._heads.weight[0])
                self._value_bias.copy_(self._heads.bias[0])

    def fold(self, gain: float, shift: float) -> None:
        """Make the value function predict ``gain · r + shift``; before it has learned anything."""
        with torch.no_grad():
            self._value_weight_H.mul_(gain)
            self._value_bias.mul_(gain).add_(shift)

    def policy_logprobs(self, batch: Batch) -> Tensor:
        """Return log π of the answers' tokens, shape [N], with gradients unless they are off."""
        return self.backbone.answer_logprobs(batch, self.backbone.hidden(batch))

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Return log π_ref of the same tokens."""
        with torch.no_grad():
            return self.backbone.answer_logprobs(batch, self._reference_hidden(batch))

    def values(self, batch: Batch) -> Tensor:
        """Return V before each of the answers' tokens, shape [N].

        It reads what the reward of an answer that ended there would read: the mean over its tokens
        so far, and before the first of them the prompt's last.
        """
        with self._wearing(self._value_adapter):
            hidden = self.backbone.hidden(batch)
        weight_H = self._value_weight_H.to(hidden.device)
        before_NH = hidden[batch.packed.source_N.to(hidden.device)].to(weight_H.dtype)
        state_N = (before_NH @ weight_H).cpu()
        return _running_means(state_N, batch.packed) + self._value_bias

    def rewards(self, batch: Batch) -> Tensor:
        """Return every head's reward of the answers, shape [A, E]."""
        with torch.no_grad(), self._wearing(self._reward):
            hidden = self.backbone.hidden(batch)
            result: Tensor = self._heads(pooled(hidden, batch.packed))
        return result

    def divergence(self, batch: Batch) -> Tensor:
        """Return KL(π ‖ π_ref) of each answer over the whole vocabulary, in nats, shape [A]."""
        packed = batch.packed
        with torch.no_grad():
            policy = self.backbone.hidden(batch)
            kl_N = self.backbone.answer_kl(batch, policy, self._reference_hidden(batch))
        return kl_N.new_zeros(packed.num_answers).index_add(0, packed.owner_N, kl_N)

    @contextmanager
    def policy_of(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Have other weights be the policy within this context."""
        with self._wearing(_frozen(tensors)):
            yield

    def set_policy(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the policy these weights."""
        self._adapter.load(tensors)

    def _reference_hidden(self, batch: Batch) -> Tensor:
        if self._start is None:
            return self.backbone.hidden(batch, with_adapter=False)
        with self._wearing(self._start):
            return self.backbone.hidden(batch)

    @contextmanager
    def _wearing(self, parameters: Parameters) -> Iterator[None]:
        before, self._worn = self._worn, parameters
        self._adapter.bind(parameters)
        try:
            yield
        finally:
            self._worn = before
            self._adapter.bind(before)


def _running_means(state_N: Tensor, packed: Packed) -> Tensor:
    """Return the mean over the states of each answer so far; the prompt's counts where it is alone.

    Args:
        state_N: of the position before each answer token: the prompt's last, then the answer's own.
        packed: the layout.
    """
    first_N = (packed.last_target_A - packed.length_A + 1)[packed.owner_N]
    index_N = torch.arange(first_N.shape[0]) - first_N
    own_N = state_N.double() * (index_N > 0)
    # In fp64, so that what other answers add before it leaves no rounding in the difference.
    summed_N = own_N.cumsum(0)
    mean_N = (summed_N - summed_N[first_N]) / index_N.clamp(min=1)
    return torch.where(index_N > 0, mean_N.to(state_N.dtype), state_N)


def _frozen(tensors: Mapping[str, Tensor]) -> Parameters:
    return {
        name: nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in tensors.items()
    }

"""Which prompts each iteration asks, which policy answers, and under which names.

Owns the order of prompts (a permutation for each pass, by seed), the names of plans and of the
policies under training, and how far the sampler may be behind. Pure, any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heedful_trainer.ppo.settings import PpoSettings
from heedful_trainer.rollouts.records import Ids, Plan


class Planner:
    """The plans of one run.

    Args:
        train: prompts to learn from, at least one.
        validation: prompts to choose a snapshot by.
        settings: sizes.
        seed: of the order.
        start: name of the adapter that training starts from; "" is the base.
    """

    def __init__(
        self,
        train: Sequence[Ids],
        validation: Sequence[Ids],
        settings: PpoSettings,
        seed: int,
        start: str = "",
    ) -> None:
        assert train
        self._train, self._settings, self._seed = list(train), settings, seed
        self.start = start
        self._validation = tuple(validation[: settings.stopping.prompts])

    def training(self, iteration: int) -> Plan:
        """Return the rollouts that an iteration learns from."""
        settings = self._settings
        count = max(1, settings.batch_episodes // settings.samples_per_prompt)
        first = iteration * count
        return Plan(
            name=f"train-{iteration:06d}",
            policy=self.policy_after(self.drawn_from(iteration)),
            prompts=tuple(self._at(first + i) for i in range(count)),
            samples=settings.samples_per_prompt,
            max_tokens=settings.max_answer_tokens,
            seed=self._seed,
        )

    def validation(self, iteration: int, policy: str) -> Plan | None:
        """Return one answer to each validation prompt; None where there are no such prompts."""
        if not self._validation:
            return None
        return Plan(
            name=f"look-{iteration:06d}",
            policy=policy,
            prompts=self._validation,
            samples=1,
            max_tokens=self._settings.max_answer_tokens,
            seed=self._seed,
        )

    def is_changed(self, iterations: int) -> bool:
        """Say whether the policy is another one than at the start after so many iterations."""
        return iterations > self._settings.value_only_iterations

    def policy_after(self, iterations: int) -> str:
        """Return the name of the policy after so many iterations."""
        return f"ppo-{iterations:06d}" if self.is_changed(iterations) else self.start

    def drawn_from(self, iteration: int) -> int:
        """Return after how many iterations the policy answers: one fewer where they overlap."""
        return max(0, iteration - 1) if self._settings.overlap else iteration

    def _at(self, position: int) -> Ids:
        epoch, within = divmod(position, len(self._train))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return self._train[int(torch.randperm(len(self._train), generator=generator)[within])]

"""A source of rollouts without a server: a backbone of one's own samples.

Owns the sampling, at T = 1 without truncation, each answer by a seed of its own. It recomputes the
whole answer for each token, so it is for tiny models: tests and ablations. It must have a backbone
that nobody trains, because it samples in the drawer's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from heedful_trainer.backbone import Backbone
from heedful_trainer.lora import read_weights
from heedful_trainer.packing import Row
from heedful_trainer.rollouts.records import Ids, Plan, Rollout


class LocalSource:
    """Rollouts from a backbone.

    Args:
        backbone: not the one that is trained.
        adapters: directory in which policies lie, by name.
        eos_token_id: ends an answer.
    """

    def __init__(self, backbone: Backbone, adapters: Path, eos_token_id: int) -> None:
        self._backbone, self._adapters, self._eos = backbone, adapters, eos_token_id
        self._lock = threading.Lock()  # two plans may be drawn at once

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        """Return the answers to a part of a plan."""
        return await asyncio.to_thread(self._draw_alone, plan, start, prompts)

    async def release(self, policy: str) -> None:
        """Nothing is held."""

    def _draw_alone(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        with self._lock:
            return self._draw(plan, start, prompts)

    def _draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        if plan.policy:
            self._backbone.adapter.load(read_weights(self._adapters / plan.policy))
        asked = [prompt for prompt in prompts for _ in range(plan.samples)]
        generators = [
            torch.Generator().manual_seed(plan.seed_of(start + i // plan.samples) + i)
            for i in range(len(asked))
        ]
        answers: list[list[int]] = [[] for _ in asked]
        logprobs: list[list[float]] = [[] for _ in asked]
        open_ones = list(range(len(asked)))
        while open_ones:
            table = self._next_logprobs([(asked[i], answers[i]) for i in open_ones], plan.policy)
            for logprobs_V, i in zip(table, open_ones, strict=True):
                token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generators[i]))
                answers[i].append(token)
                logprobs[i].append(float(logprobs_V[token]))
            open_ones = [
                i
                for i in open_ones
                if answers[i][-1] != self._eos and len(answers[i]) < plan.max_tokens
            ]
        return [
            Rollout(prompt, tuple(ids), tuple(values), ids[-1] == self._eos)
            for prompt, ids, values in zip(asked, answers, logprobs, strict=True)
        ]

    def _next_logprobs(self, states: Sequence[tuple[Ids, list[int]]], policy: str) -> torch.Tensor:
        # The token at the end is a stand-in: what predicts it is what is wanted.
        rows = [Row(prompt, ((*answer, 0),)) for prompt, answer in states]
        with torch.no_grad():
            batch = self._backbone.batch(rows, keep=False)
            hidden = self._backbone.hidden(batch, with_adapter=bool(policy))
            last_A = batch.packed.source_N[batch.packed.last_target_A].to(hidden.device)
            logits_AV = (hidden[last_A] @ self._backbone.head_VH.T).cpu()
        return logits_AV.float().log_softmax(-1)

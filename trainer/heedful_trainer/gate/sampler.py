"""Answers and scores for the gate: what it needs of a server, and the one real server behind it.

Owns the protocol `Sampler` and `ServerSampler`, which asks a running server as any client does, at
background priority and outside the log (purpose rollout). Model names are aliases, versions or
"run:<run>/<name>"; that those are loaded, and stay so, is the run's matter. Event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import heedful

from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.gate.types import GatePrompt

ScoreItem: TypeAlias = tuple[heedful.Prompt, str | tuple[int, ...]]
"""A prompt and a completion of it; a str is closed by the end token."""

_SCORE_BATCH = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer; `logprobs` are under the sampling policy's raw logits, in nats."""

    text: str
    token_ids: tuple[int, ...]  # with the end token, where it ended
    logprobs: tuple[float, ...]
    ended: bool  # by itself, within the budget

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Draw:
    """How an answer is drawn; never truncated."""

    temperature: float
    max_tokens: int
    seed: int


class Sampler(Protocol):
    """What the gate asks of the served policies."""

    async def answer(
        self, model: str, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> list[Answer]:
        """Return one answer to each prompt, prompt i drawn with seed `draw.seed + i`."""
        ...

    async def score(self, model: str, items: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        """Return the log-prob of each token of each completion, in nats."""
        ...


class ServerSampler:
    """The sampler over a running server."""

    def __init__(self, client: heedful.AsyncClient, settings: SamplingSettings) -> None:
        self._client = client
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def answer(
        self, model: str, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> list[Answer]:
        """Return one answer to each prompt.

        Raises:
            HeedfulError: the server refused a prompt or went away.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._answer(model, prompt, draw, draw.seed + idx))
                for idx, prompt in enumerate(prompts)
            ]
        return [task.result() for task in tasks]

    async def score(self, model: str, items: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        """Return the log-prob of each token of each completion.

        Raises:
            HeedfulError: as for `answer`.
        """
        batches = [items[i : i + _SCORE_BATCH] for i in range(0, len(items), _SCORE_BATCH)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._score(model, batch)) for batch in batches]
        return [logprobs for task in tasks for logprobs in task.result()]

    async def _answer(self, model: str, prompt: heedful.Prompt, draw: Draw, seed: int) -> Answer:
        async with self._slots:
            generation = await self._client.generate(
                prompt,
                model=model,
                temperature=draw.temperature,
                max_tokens=draw.max_tokens,
                seed=seed,
                logprobs=True,
                priority="background",
                purpose="rollout",
                timeout_s=self._settings.timeout_s,
            )
        completion = generation.completions[0]
        return Answer(
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=tuple(token.logprob for token in completion.logprobs),
            ended=completion.finish_reason is heedful.FinishReason.STOP,
        )

    async def _score(self, model: str, batch: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        async with self._slots:
            scores = await self._client.score(
                batch, model=model, priority="background", timeout_s=self._settings.timeout_s
            )
        return [score.logprobs for score in scores]


def prompt_of(prompt: GatePrompt) -> heedful.Prompt:
    """Return a prompt as the client takes it: its token ids, else its conversation."""
    if prompt.token_ids:
        return list(prompt.token_ids)
    return [heedful.Message(role, content) for role, content in prompt.messages]

"""Answers and scores for the gate: what it needs of a server, and the one real server behind it.

Owns the protocol `Sampler` and `ServerSampler`, which asks a running server as any client does, at
background priority and outside the log (purpose rollout). Model names are aliases, versions or
"run:<run>/<name>"; that those are loaded, and stay so, is the run's matter. Event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, cast

import heedful

from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.gate.types import GatePrompt

ScoreItem: TypeAlias = tuple[heedful.Prompt, str | tuple[int, ...]]
"""A prompt and a completion of it; a str is closed by the end token."""

_T = TypeVar("_T")
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
        self._context_tokens = 0  # not asked yet

    async def answer(
        self, model: str, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> list[Answer]:
        """Return one answer to each prompt.

        Raises:
            HeedfulError: the server refused a prompt or went away.
        """
        if not self._context_tokens:
            base = (await self._client.list_models()).base
            self._context_tokens = base.context_tokens if base is not None else 0
        return await _together(
            [
                self._answer(model, prompt, draw, draw.seed + idx)
                for idx, prompt in enumerate(prompts)
            ]
        )

    async def score(self, model: str, items: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        """Return the log-prob of each token of each completion.

        Raises:
            HeedfulError: as for `answer`.
        """
        batches = [items[i : i + _SCORE_BATCH] for i in range(0, len(items), _SCORE_BATCH)]
        found = await _together([self._score(model, batch) for batch in batches])
        return [logprobs for scored in found for logprobs in scored]

    async def _answer(self, model: str, prompt: heedful.Prompt, draw: Draw, seed: int) -> Answer:
        room = self._context_tokens or draw.max_tokens
        async with self._slots:
            if room < 4 * draw.max_tokens:  # a small context: the prompt may leave less than asked
                room -= await self._length(prompt)
            generation = await self._client.generate(
                prompt,
                model=model,
                temperature=draw.temperature,
                max_tokens=max(1, min(draw.max_tokens, room)),
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

    async def _length(self, prompt: heedful.Prompt) -> int:
        if isinstance(prompt, str):
            prompt = [heedful.Message("user", prompt)]
        if not isinstance(prompt, heedful.Text) and isinstance(prompt[0], int):
            return len(prompt)
        asked = cast("heedful.Text | Sequence[heedful.Message]", prompt)
        return len((await self._client.tokenize(asked)).token_ids)

    async def _score(self, model: str, batch: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        async with self._slots:
            scores = await self._client.score(
                batch, model=model, priority="background", timeout_s=self._settings.timeout_s
            )
        return [score.logprobs for score in scores]


async def _together(calls: Sequence[Coroutine[None, None, _T]]) -> list[_T]:
    """Return what the calls return; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def prompt_of(prompt: GatePrompt) -> heedful.Prompt:
    """Return a prompt as the client takes it: its token ids, else its conversation."""
    if prompt.token_ids:
        return list(prompt.token_ids)
    return [heedful.Message(role, content) for role, content in prompt.messages]

"""Prompts with several answers as rows of one batch: the prompt once, the answers beside it.

Owns the layout: rows stand one after the other in a single sequence of T tokens, so that nothing is
padded. A row is ``prompt | answer 0 | answer 1 | …``, every answer sees the prompt and itself,
positions of each answer go on from the prompt's end. So K answers cost one prompt, and each gets
the log-probs that it would have alone. It knows neither models nor losses. Pure, any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful_trainer.attention import Blocks, Segment, make_blocks


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its answers, as token ids; an answer that ended of itself ends in EOS."""

    prompt: tuple[int, ...]  # at least one token
    answers: tuple[tuple[int, ...], ...]  # each at least one token

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of rows, T tokens in all, with N answer tokens in A answers."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    blocks: Blocks  # who sees whom
    source_N: Tensor  # index of the hidden state that predicts each answer token
    target_N: Tensor  # the answer tokens
    owner_N: Tensor  # which answer each belongs to
    last_A: Tensor  # index of each answer's last token
    last_target_A: Tensor  # index within N of each answer's last token
    length_A: Tensor  # tokens of each answer

    @property
    def own_N(self) -> Tensor:  # noqa: N802 - carries its shape
        """Index of each answer token's own hidden state."""
        offset_A = self.last_A - self.last_target_A
        return offset_A[self.owner_N] + torch.arange(self.target_N.shape[0])

    @property
    def num_answers(self) -> int:
        """A."""
        return self.last_A.shape[0]


def pack(rows: Sequence[Row]) -> Packed:
    """Lay rows out as one sequence."""
    parts = _Parts([], [], [], [], [], [])
    input_ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for row in rows:
        assert row.prompt
        context = len(input_ids), len(input_ids) + len(row.prompt)
        input_ids += row.prompt
        positions += range(len(row.prompt))
        segments.append(Segment(*context, (0, 0)))
        for answer in row.answers:
            start = len(input_ids)
            parts.add(context[1] - 1, start, answer)
            input_ids += answer
            positions += range(len(row.prompt), len(row.prompt) + len(answer))
            segments.append(Segment(start, len(input_ids), context))
    return Packed(
        torch.tensor([input_ids]),
        torch.tensor([positions]),
        make_blocks(segments),
        *(torch.tensor(part, dtype=torch.long) for part in parts.as_lists()),
    )


def cut(sizes: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Return examples in groups of like size with at most so many tokens, as indices.

    An example that is larger alone is a group of its own.
    """
    groups: list[list[int]] = []
    left = 0
    for example in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not groups or sizes[example] > left:
            groups.append([])
            left = most_tokens
        groups[-1].append(example)
        left -= sizes[example]
    return groups


@dataclass(slots=True)
class _Parts:
    source: list[int]
    target: list[int]
    owner: list[int]
    last: list[int]
    last_target: list[int]
    length: list[int]

    def add(self, last_of_prompt: int, start: int, answer: tuple[int, ...]) -> None:
        assert answer
        self.owner += [len(self.last)] * len(answer)
        self.target += answer
        # The prompt's last token predicts the first token of every answer.
        self.source += [last_of_prompt, *range(start, start + len(answer) - 1)]
        self.last.append(start + len(answer) - 1)
        self.last_target.append(len(self.target) - 1)
        self.length.append(len(answer))

    def as_lists(self) -> tuple[list[int], ...]:
        return (
            self.source,
            self.target,
            self.owner,
            self.last,
            self.last_target,
            self.length,
        )

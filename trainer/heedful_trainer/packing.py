"""Prompts with several answers as rows of one batch: the prompt once, the answers beside it.

Owns the layout and its masks: a row is ``prompt | answer 0 | answer 1 | …``, every answer sees the
prompt and itself, positions of each answer go on from the prompt's end. So K answers cost one
prompt, and each gets the log-probs that it would have alone. It knows neither models nor losses.
Pure, any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """A batch of B rows of at most T tokens, with N answer tokens in A answers.

    Indices into hidden states count over the flattened [B · T].
    """

    input_ids_BT: Tensor  # 0 where a row is padded
    position_ids_BT: Tensor
    mask_B1TT: Tensor  # true: the token of dimension 2 sees the token of dimension 3
    source_N: Tensor  # flat index of the hidden state that predicts each answer token
    target_N: Tensor  # the answer tokens
    owner_N: Tensor  # which answer each belongs to
    last_A: Tensor  # flat index of each answer's last token
    last_target_A: Tensor  # index within N of each answer's last token
    length_A: Tensor  # tokens of each answer
    row_of_A: Tensor  # which row each answer is in

    @property
    def own_N(self) -> Tensor:  # noqa: N802 - carries its shape
        """Flat index of each answer token's own hidden state."""
        offset_A = self.last_A - self.last_target_A
        return offset_A[self.owner_N] + torch.arange(self.target_N.shape[0])

    @property
    def num_answers(self) -> int:
        """A."""
        return self.last_A.shape[0]


def pack(rows: Sequence[Row]) -> Packed:
    """Lay rows out as a batch, padded on the right to the longest."""
    width = max(row.num_tokens for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1, dtype=torch.long)
    parts = _Parts([], [], [], [], [], [], [])
    for idx, row in enumerate(rows):
        tokens = [*row.prompt, *(token for answer in row.answers for token in answer)]
        input_ids[idx, : len(tokens)] = torch.tensor(tokens)
        start = len(row.prompt)
        position_ids[idx, :start] = torch.arange(start)
        segments[idx, :start] = 0
        for number, answer in enumerate(row.answers, 1):
            end = start + len(answer)
            segments[idx, start:end] = number
            position_ids[idx, start:end] = torch.arange(len(answer)) + len(row.prompt)
            parts.add(idx, idx * width, start, len(row.prompt), answer)
            start = end
    return Packed(
        input_ids,
        position_ids,
        _mask(segments),
        *(torch.tensor(part, dtype=torch.long) for part in parts.as_lists()),
    )


@dataclass(slots=True)
class _Parts:
    source: list[int]
    target: list[int]
    owner: list[int]
    last: list[int]
    last_target: list[int]
    length: list[int]
    row_of: list[int]

    def add(self, row: int, offset: int, start: int, prompt: int, answer: tuple[int, ...]) -> None:
        assert prompt
        assert answer
        self.owner += [len(self.last)] * len(answer)
        self.target += answer
        # The prompt's last token predicts the first token of every answer.
        self.source += [
            offset + prompt - 1,
            *range(offset + start, offset + start + len(answer) - 1),
        ]
        self.last.append(offset + start + len(answer) - 1)
        self.last_target.append(len(self.target) - 1)
        self.length.append(len(answer))
        self.row_of.append(row)

    def as_lists(self) -> tuple[list[int], ...]:
        return (
            self.source,
            self.target,
            self.owner,
            self.last,
            self.last_target,
            self.length,
            self.row_of,
        )


def _mask(segments_BT: Tensor) -> Tensor:
    width = segments_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
    query, key = segments_BT[:, :, None], segments_BT[:, None, :]
    # Padding sees itself, so that no row of the softmax is empty; nobody sees padding.
    visible = (key == query) | (key == 0) & (query > 0)
    return (visible & causal_TT)[:, None]

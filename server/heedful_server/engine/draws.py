"""Sampler rows as the settings of draws that a decoder makes itself, and back to sampled tokens.

Owns which rows the device's sampler cannot take (counted, and sampled by sampler.py), how
penalties, bias and forbidden tokens become sparse edits, and what is read of a step. Log-probs of
the device may differ from sampler.py's in their last bits, since sums are taken in another order;
the distribution, its ties and its random stream are the same. Runs in the engine child's main
thread.

The step's one wait for the device is in `read_draws`. Rows that ask for alternatives are sorted on
the device besides, and waited for a second time.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from heedful_kernels.launch import count_fallback
from heedful_kernels.sample import NOT_FINITE, OK, SampleEdits, SampleSettings
from heedful_kernels.sample_reference import row_key
from numpy.typing import NDArray
from torch import Tensor

from heedful_server.engine.sampler import (
    FAILED_TOKEN_ID,
    NONE_ALLOWED_ERROR,
    NOT_FINITE_ERROR,
    SampledTokens,
    SamplerRow,
    ending_ids,
    put,
    sample,
)
from heedful_server.model.batch import Draws, ForwardResult
from heedful_server.model.cuda_draws import Drawn, read_drawn
from heedful_server.model.to_device import sent

# Kernels are compiled for a width, so that few widths may occur; the last is the most they take.
_EDIT_WIDTHS: Final = (16, 64, 256, 1024, 2048)
_PASSES: Final = {2: "second_pass", 3: "third_pass"}


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """The draws of a step, and the rows that are sampled by sampler.py instead."""

    draws: Draws
    other_rows: list[int]


@dataclass(slots=True)
class _RowEdits:
    """A row's tokens whose logits change."""

    bias: dict[int, float]
    counts: Counter[int]
    seen: set[int]

    @property
    def token_ids(self) -> list[int]:
        return sorted(self.bias.keys() | self.counts.keys() | self.seen)


def plan_draws(
    rows: Sequence[SamplerRow], logit_rows: Sequence[int], num_logit_rows: int, vocab_size: int
) -> DrawPlan:
    """What the decoder is to draw for rows, each from its row of logits."""
    edits = [_row_edits(row, vocab_size) for row in rows]
    others = [i for i, edit in enumerate(edits) if len(edit.token_ids) > _EDIT_WIDTHS[-1]]
    for row in others:
        count_fallback("sample", "many_edits")
        edits[row] = _RowEdits({}, Counter(), set())
    settings = SampleSettings(
        keys_R2=_keys(rows),
        temperature_R=torch.tensor([row.params.temperature for row in rows]),
        top_k_R=torch.tensor([row.params.top_k for row in rows], dtype=torch.int32),
        top_p_R=torch.tensor([row.params.top_p for row in rows], dtype=torch.float64),
        log_min_p_R=torch.tensor([_log(row.params.min_p) for row in rows]),
        edits=_edits(rows, edits),
        allowed_RW=_allowed(rows, vocab_size),
    )
    in_order = list(logit_rows) == list(range(num_logit_rows))
    return DrawPlan(Draws(settings, None if in_order else torch.tensor(logit_rows)), others)


def read_draws(plan: DrawPlan, result: ForwardResult, rows: Sequence[SamplerRow]) -> SampledTokens:
    """Wait for the step's draws and return them."""
    assert result.drawn_6D is not None, "the decoder draws what its batch asks for"
    drawn = read_drawn(result.drawn_6D)
    sampled = _as_sampled(drawn)
    for number in drawn.passes:
        if number in _PASSES:
            count_fallback("sample", _PASSES[number])
    healthy = [i for i, error in enumerate(sampled.errors) if error is None]
    _add_alternatives(sampled, plan, result.logits_RV, rows, healthy)
    if plan.other_rows:
        logits_RV = _logits_of(plan, result.logits_RV, plan.other_rows)
        put(sampled, plan.other_rows, sample(logits_RV, [rows[i] for i in plan.other_rows]))
    return sampled


def _as_sampled(drawn: Drawn) -> SampledTokens:
    errors = [
        None if status == OK else NOT_FINITE_ERROR if status == NOT_FINITE else NONE_ALLOWED_ERROR
        for status in drawn.statuses
    ]
    return SampledTokens(
        token_ids=[
            token_id if error is None else FAILED_TOKEN_ID
            for token_id, error in zip(drawn.token_ids, errors, strict=True)
        ],
        logprobs=drawn.logprobs,
        sampling_logprobs=drawn.sampling_logprobs,
        kept_mass=drawn.kept_mass,
        top=[[] for _ in errors],
        errors=errors,
    )


def _add_alternatives(
    sampled: SampledTokens,
    plan: DrawPlan,
    logits_RV: Tensor,
    rows: Sequence[SamplerRow],
    healthy: list[int],
) -> None:
    wanted = [i for i in healthy if rows[i].params.top_logprobs and i not in plan.other_rows]
    if not wanted:
        return
    logp_RV = torch.log_softmax(_logits_of(plan, logits_RV, wanted).float(), dim=-1)
    ranked = torch.sort(logp_RV, dim=-1, descending=True, stable=True)
    most = min(max(rows[i].params.top_logprobs for i in wanted), logp_RV.shape[1])
    both = torch.stack((ranked.indices[:, :most].double(), ranked.values[:, :most].double()))
    ids, values = both.cpu().tolist()
    for position, row in enumerate(wanted):
        count = min(rows[row].params.top_logprobs, most)
        sampled.top[row] = [
            (int(token_id), value)
            for token_id, value in zip(ids[position][:count], values[position][:count], strict=True)
        ]


def _logits_of(plan: DrawPlan, logits_RV: Tensor, rows: list[int]) -> Tensor:
    draw_rows = plan.draws.rows_D
    chosen = torch.tensor(rows) if draw_rows is None else draw_rows[rows]
    return logits_RV.index_select(0, sent(chosen, logits_RV.device))


def _row_edits(row: SamplerRow, vocab_size: int) -> _RowEdits:
    params = row.params
    bias = {token_id: value for token_id, value in params.logit_bias if token_id < vocab_size}
    for token_id in _forbidden(row, vocab_size):
        bias[token_id] = -math.inf
    counts: Counter[int] = Counter()
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = Counter(i for i in row.completion_token_ids if i < vocab_size)
    seen: set[int] = set()
    if params.repetition_penalty != 1.0:
        tokens = {*row.prompt_token_ids, *row.completion_token_ids}
        seen = {token_id for token_id in tokens if token_id < vocab_size}
    return _RowEdits(bias, counts, seen)


def _forbidden(row: SamplerRow, vocab_size: int) -> list[int]:
    """Tokens that would end the completion too early, unless the mask leaves nothing else."""
    if row.position >= row.params.min_tokens:
        return []
    ending = sorted(i for i in ending_ids(row) if 0 <= i < vocab_size)
    if row.token_mask is None:
        return ending
    bits = np.unpackbits(row.token_mask.numpy().view(np.uint8), bitorder="little")[:vocab_size]
    allowed = bits.copy()
    allowed[ending] = 0
    return ending if allowed.any() else []


def _edits(rows: Sequence[SamplerRow], edits: Sequence[_RowEdits]) -> SampleEdits | None:
    ids = [edit.token_ids for edit in edits]
    longest = max(map(len, ids))
    if longest == 0:
        return None
    width = next(width for width in _EDIT_WIDTHS if width >= longest)
    shape = (len(rows), width)
    token_ids = np.full(shape, -1, np.int32)
    bias = np.zeros(shape, np.float32)
    counts = np.zeros(shape, np.int32)
    seen = np.zeros(shape, np.bool_)
    for row, (edit, listed) in enumerate(zip(edits, ids, strict=True)):
        token_ids[row, : len(listed)] = listed
        for place, token_id in enumerate(listed):
            bias[row, place] = edit.bias.get(token_id, 0.0)
            counts[row, place] = edit.counts.get(token_id, 0)
            seen[row, place] = token_id in edit.seen
    return SampleEdits(
        token_ids_RE=torch.from_numpy(token_ids),
        bias_RE=torch.from_numpy(bias),
        counts_RE=torch.from_numpy(counts),
        seen_RE=torch.from_numpy(seen),
        repetition_R=_doubles([row.params.repetition_penalty for row in rows]),
        presence_R=_doubles([row.params.presence_penalty for row in rows]),
        frequency_R=_doubles([row.params.frequency_penalty for row in rows]),
    )


def _allowed(rows: Sequence[SamplerRow], vocab_size: int) -> Tensor | None:
    if all(row.token_mask is None for row in rows):
        return None
    words = -(-vocab_size // 32)
    allowed_RW = torch.full((len(rows), words), -1, dtype=torch.int32)
    for idx, row in enumerate(rows):
        if row.token_mask is not None:
            # A tokenizer may name more tokens than there are logits, or fewer.
            mask_W = row.token_mask[:words]
            allowed_RW[idx, : len(mask_W)] = mask_W
            allowed_RW[idx, len(mask_W) :] = 0
    return allowed_RW


def _keys(rows: Sequence[SamplerRow]) -> Tensor:
    keys: NDArray[np.uint32] = np.array(
        [row_key(row.params.seed, row.sample_idx, row.position) for row in rows], np.uint32
    )
    return torch.from_numpy(keys.view(np.int32))


def _log(min_p: float) -> float:
    return math.log(min_p) if min_p > 0.0 else -math.inf


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

"""Turns a step plan into the tensors of one forward pass.

Owns the mapping from sequences and block tables to rows of a flat batch; knows nothing of weights
or of requests. Pure conversion, called by the runner in the engine child's main thread.
"""

from dataclasses import dataclass

import numpy as np
import torch

from heedful_server.engine.scheduler import Chunk, StepPlan
from heedful_server.engine.sequence import Sequence
from heedful_server.model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Logit rows of a sequence's own tokens: row_start + i predicts token target_start + i."""

    sequence: Sequence
    target_start: int
    row_start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A forward batch and which of its logit rows are whose."""

    batch: ForwardBatch
    sample_rows: list[int]
    scored: list[ScoredRows]
    hidden: list[Sequence]  # whose final hidden state each of hidden_rows is


def prepare_step(plan: StepPlan, block_size: int) -> PreparedStep:
    """Build the batch of a non-empty plan."""
    num_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slots = np.empty(num_tokens, np.int64)
    ends = [chunk.start + chunk.num_tokens for chunk in plan.chunks]
    tables = np.zeros((len(plan.chunks), -(-max(ends) // block_size)), np.int32)
    starts = [0]
    for row, (chunk, end) in enumerate(zip(plan.chunks, ends, strict=True)):
        num_blocks = -(-end // block_size)
        tables[row, :num_blocks] = chunk.sequence.block_table[:num_blocks]
        first, last = starts[-1], starts[-1] + chunk.num_tokens
        token_ids[first:last] = chunk.sequence.token_ids[chunk.start : end]
        chunk_positions = np.arange(chunk.start, end)
        positions[first:last] = chunk_positions
        blocks = tables[row, chunk_positions // block_size].astype(np.int64)
        slots[first:last] = blocks * block_size + chunk_positions % block_size
        starts.append(last)
    logit_rows, sample_rows, scored = _logit_rows(plan, starts)
    hidden = _hidden_rows(plan, starts)
    adapter_slots = tuple(chunk.sequence.adapter_slot for chunk in plan.chunks)
    batch = ForwardBatch(
        token_ids_T=torch.from_numpy(token_ids),
        positions_T=torch.from_numpy(positions),
        slot_mapping_T=torch.from_numpy(slots),
        block_tables_SN=torch.from_numpy(tables),
        query_starts=tuple(starts),
        context_lens=tuple(ends),
        logit_rows_R=torch.tensor(logit_rows, dtype=torch.int64),
        hidden_rows=tuple(row for _, row in hidden),
        adapter_slots=adapter_slots if max(adapter_slots) >= 0 else None,
    )
    return PreparedStep(batch, sample_rows, scored, [sequence for sequence, _ in hidden])


def _hidden_rows(plan: StepPlan, starts: list[int]) -> list[tuple[Sequence, int]]:
    """Rows whose sequence wants their hidden state."""
    return [
        (chunk.sequence, start + position - chunk.start)
        for chunk, start in zip(plan.chunks, starts, strict=False)
        if chunk.sequence.wants_hidden
        for position in chunk.logit_positions
    ]


def _logit_rows(plan: StepPlan, starts: list[int]) -> tuple[list[int], list[int], list[ScoredRows]]:
    logit_rows: list[int] = []
    row_of_chunk: dict[int, int] = {}
    sample_rows = []
    for sample in plan.samples:
        row = row_of_chunk.get(sample.chunk_idx)
        if row is None:
            row = row_of_chunk[sample.chunk_idx] = len(logit_rows)
            logit_rows.append(starts[sample.chunk_idx + 1] - 1)
        sample_rows.append(row)
    scored = []
    for chunk, start in zip(plan.chunks, starts, strict=False):
        wanted = _scored_positions(chunk)
        if wanted:
            scored.append(
                ScoredRows(chunk.sequence, wanted.start + 1, len(logit_rows), len(wanted))
            )
            logit_rows += [start + position - chunk.start for position in wanted]
    return logit_rows, sample_rows, scored


def _scored_positions(chunk: Chunk) -> range:
    """Positions of the chunk whose logits score the next token of the same sequence."""
    sequence = chunk.sequence
    if not sequence.scores or sequence.wants_hidden:
        return range(0)
    wanted = chunk.logit_positions
    # The last token of a scored sequence predicts nothing that is known.
    return range(wanted.start, min(wanted.stop, len(sequence.token_ids) - 1))

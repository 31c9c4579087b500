"""A step's tensors as the Triton kernels read them, and their fixed-size form for graphs.

Owns the record, its making from a batch, and the padding of a step of single tokens to a bucket of
rows and of context: padding rows have slot -1 (nothing is written), a context of 0 (attention gives
zeros), no adapter and a greedy draw that nobody reads. Knows no weights. Used by the engine
child's main thread.
"""

import bisect
from dataclasses import dataclass
from typing import Final

import torch
from heedful_kernels.sample import SampleSettings
from torch import Tensor

from heedful_server.model.batch import ForwardBatch
from heedful_server.model.cuda_draws import empty_settings, fill_settings, is_plain
from heedful_server.model.to_device import pinned, sent

ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
# More programs than a context needs return at once, so few sizes are enough.
_CONTEXT_FACTOR: Final = 4
_SMALLEST_CONTEXT: Final = 1024


@dataclass(frozen=True, slots=True)
class CudaStep:
    """Rows and sequences of one forward pass, on the device; fields as in `ForwardBatch`."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    block_tables_SN: Tensor
    query_starts_S1: Tensor
    context_lens_S: Tensor
    logit_rows_R: Tensor
    hidden_rows_Q: Tensor
    adapter_slots_T: Tensor | None
    max_query_tokens: int
    max_context_tokens: int
    settings: SampleSettings | None = None  # of the draws that are part of a captured step


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a captured step is fixed to."""

    rows: int
    context_tokens: int
    adapters: bool
    draws: bool


def make_step(batch: ForwardBatch, device: torch.device) -> CudaStep:
    """Copy a batch to the device, without waiting for it."""
    starts = torch.tensor(batch.query_starts, dtype=torch.int32)
    lengths = starts.diff()
    adapters = None
    if batch.adapter_slots is not None:
        slots_S = torch.tensor(batch.adapter_slots, dtype=torch.int32)
        adapters = sent(slots_S.repeat_interleave(lengths), device)
    return CudaStep(
        token_ids_T=sent(batch.token_ids_T, device),
        positions_T=sent(batch.positions_T, device),
        slots_T=sent(batch.slot_mapping_T, device),
        block_tables_SN=sent(batch.block_tables_SN, device),
        query_starts_S1=sent(starts, device),
        context_lens_S=sent(torch.tensor(batch.context_lens, dtype=torch.int32), device),
        logit_rows_R=sent(batch.logit_rows_R, device),
        hidden_rows_Q=sent(torch.tensor(batch.hidden_rows, dtype=torch.int64), device),
        adapter_slots_T=adapters,
        max_query_tokens=int(lengths.max()),
        max_context_tokens=max(batch.context_lens),
    )


def is_plain_decode(batch: ForwardBatch) -> bool:
    """Whether every sequence has one token, wants its logits, and nothing else."""
    rows = len(batch.context_lens)
    return (
        batch.query_starts[-1] == rows <= ROW_BUCKETS[-1]
        and batch.query_starts == tuple(range(rows + 1))
        and not batch.hidden_rows
        and len(batch.logit_rows_R) == rows
        and torch.equal(batch.logit_rows_R, torch.arange(rows))
    )


def step_size(batch: ForwardBatch, context_tokens: int) -> StepSize:
    """The smallest size that a step of single tokens fits; no context exceeds context_tokens."""
    rows = ROW_BUCKETS[bisect.bisect_left(ROW_BUCKETS, len(batch.context_lens))]
    context = _SMALLEST_CONTEXT
    while context < max(batch.context_lens):
        context *= _CONTEXT_FACTOR
    has_adapters = batch.adapter_slots is not None
    return StepSize(rows, min(context, context_tokens), has_adapters, is_plain(batch.draws))


def empty_step(size: StepSize, block_size: int, device: torch.device) -> CudaStep:
    """A step of padding alone, whose tensors are written before each replay."""

    def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    rows = size.rows
    return CudaStep(
        token_ids_T=filled(0, rows, dtype=torch.int64),
        positions_T=filled(0, rows, dtype=torch.int64),
        slots_T=filled(-1, rows, dtype=torch.int64),
        block_tables_SN=filled(0, rows, -(-size.context_tokens // block_size)),
        query_starts_S1=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens_S=filled(0, rows),
        logit_rows_R=torch.arange(rows, device=device),
        hidden_rows_Q=filled(0, 0, dtype=torch.int64),
        adapter_slots_T=filled(-1, rows) if size.adapters else None,
        max_query_tokens=1,
        max_context_tokens=size.context_tokens,
        settings=empty_settings(rows, device) if size.draws else None,
    )


def fill_step(step: CudaStep, batch: ForwardBatch) -> None:
    """Write a batch of single tokens over the head of an empty step, and padding over the rest."""
    rows = len(batch.context_lens)
    pairs: list[tuple[Tensor, Tensor, int]] = [
        (step.token_ids_T, batch.token_ids_T, 0),
        (step.positions_T, batch.positions_T, 0),
        (step.slots_T, batch.slot_mapping_T, -1),
        (step.context_lens_S, torch.tensor(batch.context_lens, dtype=torch.int32), 0),
    ]
    if step.adapter_slots_T is not None:
        assert batch.adapter_slots is not None
        slots = torch.tensor(batch.adapter_slots, dtype=torch.int32)
        pairs.append((step.adapter_slots_T, slots, -1))
    if step.settings is not None:
        assert batch.draws is not None
        fill_settings(step.settings, batch.draws.settings)
    for target, source, padding in pairs:
        target[:rows].copy_(pinned(source, target.device), non_blocking=True)
        target[rows:].fill_(padding)
    tables = batch.block_tables_SN
    step.block_tables_SN[:rows, : tables.shape[1]].copy_(
        pinned(tables, step.block_tables_SN.device), non_blocking=True
    )

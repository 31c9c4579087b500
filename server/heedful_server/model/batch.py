"""The tensors of one forward pass, flat over all tokens of all sequences.

Owns the shape of that record only. The engine builds it on the CPU; the decoder reads it in the
engine child's main thread. Knows nothing of requests or of weights.
"""

from dataclasses import dataclass, replace

import torch
from heedful_kernels.sample import SampleSettings
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowStats:
    """Of each row of logits: the lowest best id (-1 where a logit is NaN), maximum, log-sum-exp."""

    argmax_R: Tensor
    max_R: Tensor
    lse_R: Tensor

    def select(self, rows: list[int]) -> "RowStats":
        """Return the statistics of some rows, which may repeat."""
        index = torch.tensor(rows)
        return RowStats(self.argmax_R[index], self.max_R[index], self.lse_R[index])


@dataclass(frozen=True, slots=True)
class Draws:
    """What a decoder that draws tokens itself is to draw: settings on the host, one row a draw.

    rows_D int64 names the row of logits of each draw; None: every row once, in order.
    """

    settings: SampleSettings
    rows_D: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What one forward pass gives back; all of it may be overwritten by the next one.

    The row statistics of the logits come only where they cost next to nothing.
    """

    logits_RV: Tensor
    stats: RowStats | None
    hidden_QH: Tensor  # what the head reads: final-normed, fp32 (fp64 in fp64 mode)
    # What was drawn where draws were asked for, fp64 [6, D]; cuda_draws.py reads it.
    drawn_6D: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens of S sequences; sequence s owns rows query_starts[s] to query_starts[s + 1] - 1.

    A row's key and value are written to its slot (block id * block size + offset) before attention,
    and it attends to the first positions_T + 1 positions of its sequence through the sequence's
    block table. The rows of one sequence are consecutive positions that end at context_lens[s] - 1.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slot_mapping_T: Tensor  # int64
    block_tables_SN: Tensor  # int32, rows padded with 0
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    logit_rows_R: Tensor  # int64 rows of T
    hidden_rows: tuple[int, ...] = ()  # rows of T whose final hidden state is wanted
    adapter_slots: tuple[int, ...] | None = None  # of each sequence, or -1; None when none has one
    draws: Draws | None = None  # asked only of a decoder that draws tokens

    def to(self, device: torch.device) -> "ForwardBatch":
        """The same batch on a device; itself when it is there already."""
        if self.token_ids_T.device == device:
            return self
        return replace(
            self,
            token_ids_T=self.token_ids_T.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            slot_mapping_T=self.slot_mapping_T.to(device, non_blocking=True),
            block_tables_SN=self.block_tables_SN.to(device, non_blocking=True),
            logit_rows_R=self.logit_rows_R.to(device, non_blocking=True),
        )

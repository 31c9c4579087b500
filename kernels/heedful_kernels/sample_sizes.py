"""How rows of logits are cut up for the sampling kernels: shared by sample.py and its tests.

Owns the number of splits of a row, the room for candidates and the tile. Kernels are compiled for
some of these numbers, so that few of them may occur. Pure functions, any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from heedful_kernels.launch import INTERPRETED, cdiv, next_power_of_2, num_multiprocessors

_CANDIDATES: Final = 4096
_MAX_SPLITS: Final = 16
_FIXED_SPLITS: Final = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a batch is cut up."""

    splits: int
    per_split: int
    capacity: int  # candidates of a split
    edits: int
    lanes: int  # of a row's candidates and edits
    block: int

    @property
    def segment(self) -> int:
        """Where the edits begin among a row's lanes."""
        return self.splits * self.capacity


def sizes_for(logits_RV: Tensor, num_edits: int, *, fixed_splits: bool) -> Sizes:
    """The sizes for rows of logits of which each may list num_edits tokens."""
    rows, vocab = logits_RV.shape
    block = 512 if INTERPRETED else 4096
    wanted = cdiv(2 * num_multiprocessors(logits_RV.device), max(rows, 1))
    # Kernels are compiled for the candidates of a split: few numbers of splits occur.
    wanted = _FIXED_SPLITS if fixed_splits else next_power_of_2(min(wanted, _MAX_SPLITS))
    splits = max(1, min(2 if INTERPRETED else wanted, cdiv(vocab, block)))
    per_split = cdiv(cdiv(vocab, splits), block) * block
    splits = cdiv(vocab, per_split)
    candidates = 512 if INTERPRETED else _CANDIDATES
    lanes = next_power_of_2(candidates // 2 + num_edits)
    lanes = max(lanes, candidates)
    return Sizes(splits, per_split, (lanes - num_edits) // splits, num_edits, lanes, block)

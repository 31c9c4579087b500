"""Runs the model: one forward pass, then sampling or scoring, for one step plan.

Owns the decoder and the KV cache; the only torch state of the engine. Knows nothing of requests,
queues or text. Runs in the engine child's main thread.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful_server.engine.batch import ScoredRows, prepare_step
from heedful_server.engine.sampler import SampledTokens, SamplerRow, sample, token_logprobs
from heedful_server.engine.scheduler import StepPlan
from heedful_server.engine.sequence import Sequence
from heedful_server.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed: tokens parallel to plan.samples, and log-probs of scored tokens."""

    sampled: SampledTokens | None
    scored: list[tuple[Sequence, int, list[float]]]


class Runner:
    """A decoder with the KV cache it writes to."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self.decoder = decoder
        self._block_size = block_size
        self._kv_cache = decoder.allocate_kv_cache(num_blocks, block_size)

    @torch.inference_mode()
    def run(self, plan: StepPlan, rows: list[SamplerRow]) -> StepResult:
        """Compute a plan's chunks; rows run parallel to plan.samples."""
        if plan.copies:
            self.decoder.copy_blocks(self._kv_cache, plan.copies)
        prepared = prepare_step(plan, self._block_size)
        logits_RV, stats = self.decoder.forward(prepared.batch, self._kv_cache)
        sampled = None
        if prepared.sample_rows:
            wanted = prepared.sample_rows
            wanted_stats = None if stats is None else stats.select(wanted)
            sampled = sample(_select_rows(logits_RV, wanted), rows, wanted_stats)
        return StepResult(sampled, [_score(logits_RV, scored) for scored in prepared.scored])


def _select_rows(logits_RV: Tensor, rows: list[int]) -> Tensor:
    # In the common case every logit row is sampled once, in order: no copy.
    if rows == list(range(logits_RV.shape[0])):
        return logits_RV
    return logits_RV[torch.tensor(rows)]


def _score(logits_RV: Tensor, scored: ScoredRows) -> tuple[Sequence, int, list[float]]:
    start, end = scored.target_start, scored.target_start + scored.num_rows
    rows_RV = logits_RV[scored.row_start : scored.row_start + scored.num_rows]
    return scored.sequence, start, token_logprobs(rows_RV, scored.sequence.token_ids[start:end])

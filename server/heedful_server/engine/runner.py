"""Runs the model: one forward pass, then sampling, scoring or rewarding, for one step plan.

Owns the decoder, the KV cache, the adapters in their slots and the reward heads that belong to
them; the only torch state of the engine. Knows nothing of requests, queues or text. Runs in the
engine child's main thread, but for load_adapter.

A step is launched and read in two calls: where the decoder draws on a GPU only the second waits,
and whatever the engine does in between runs beside the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from heedful_server.engine.adapter_slots import LoadOutcome
from heedful_server.engine.batch import PreparedStep, ScoredRows, prepare_step
from heedful_server.engine.draws import DrawPlan, plan_draws, read_draws
from heedful_server.engine.sampler import SampledTokens, SamplerRow, sample, token_logprobs
from heedful_server.engine.scheduler import StepPlan
from heedful_server.engine.sequence import Sequence
from heedful_server.model.adapter import RewardHeads, read_adapter
from heedful_server.model.batch import ForwardResult
from heedful_server.model.decoder import Decoder
from heedful_server.protocol import AdapterRole


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed: tokens parallel to plan.samples, and what was asked of given tokens.

    scored holds log-probs of a sequence's tokens, rewards what each head says of its last one.
    """

    sampled: SampledTokens | None
    scored: list[tuple[Sequence, list[float]]]
    rewards: list[tuple[Sequence, list[float]]]


class Runner:
    """A decoder with the KV cache it writes to and the adapters it has."""

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        *,
        max_adapters: int = 0,
        max_adapter_rank: int = 0,
    ) -> None:
        self.decoder = decoder
        self._block_size = block_size
        self._max_adapter_rank = max_adapter_rank
        self._heads: dict[int, RewardHeads] = {}
        decoder.reserve_adapters(max_adapters, max_adapter_rank)
        self._kv_cache = decoder.allocate_kv_cache(num_blocks, block_size)

    def load_adapter(self, slot: int, path: str, role: AdapterRole) -> LoadOutcome:
        """Read an adapter into a slot that no sequence has; may be called from any thread.

        Raises:
            BadAdapter: its files are unusable.
        """
        decoder = self.decoder
        weights = read_adapter(Path(path), decoder.spec, role, self._max_adapter_rank)
        num_bytes = decoder.load_adapter(slot, weights)
        if weights.heads is None:
            return LoadOutcome(num_bytes, weights.rank, 0)
        self._heads[slot] = weights.heads
        return LoadOutcome(num_bytes, weights.rank, weights.heads.bias_J.shape[0])

    def drop_adapter(self, slot: int) -> None:
        """Empty a slot that no sequence has."""
        self._heads.pop(slot, None)
        self.decoder.drop_adapter(slot)

    def bytes_read(self, plan: StepPlan) -> int:
        """Bytes of weights and cache that a plan's computation has to read, each once."""
        positions = sum(chunk.start + chunk.num_tokens for chunk in plan.chunks)
        block_bytes = self.decoder.kv_bytes_per_block(self._block_size)
        return self.decoder.step_weight_bytes + positions * block_bytes // self._block_size

    @property
    def overlaps(self) -> bool:
        """Whether a launched step computes while the caller goes on."""
        return self.decoder.draws_tokens and self.decoder.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: list[SamplerRow]) -> Callable[[], StepResult]:
        """Begin to compute a plan's chunks; rows run parallel to plan.samples.

        What is returned waits for the step and gives its result. It must be called before the next
        launch, which may overwrite what it reads.
        """
        if plan.copies:
            self.decoder.copy_blocks(self._kv_cache, plan.copies)
        prepared = prepare_step(plan, self._block_size)
        batch = prepared.batch
        draws: DrawPlan | None = None
        if prepared.sample_rows and self.decoder.draws_tokens:
            vocab_size = self.decoder.spec.vocab_size
            draws = plan_draws(rows, prepared.sample_rows, len(batch.logit_rows_R), vocab_size)
            batch = replace(batch, draws=draws.draws)
        result = self.decoder.forward(batch, self._kv_cache)
        return lambda: self._read(prepared, draws, result, rows)

    @torch.inference_mode()
    def _read(
        self,
        prepared: PreparedStep,
        draws: DrawPlan | None,
        result: ForwardResult,
        rows: list[SamplerRow],
    ) -> StepResult:
        if draws is not None:
            sampled: SampledTokens | None = read_draws(draws, result, rows)
        else:
            sampled = _sample(result, prepared.sample_rows, rows)
        # At once: from a GPU every row of its own would be a wait.
        hidden_QH = result.hidden_QH.cpu()
        return StepResult(
            sampled,
            [_score(result.logits_RV, scored) for scored in prepared.scored],
            [
                (sequence, _rewards(self._heads[sequence.adapter_slot], hidden_H))
                for sequence, hidden_H in zip(prepared.hidden, hidden_QH, strict=True)
            ],
        )


def _sample(
    result: ForwardResult, wanted: list[int], rows: list[SamplerRow]
) -> SampledTokens | None:
    if not wanted:
        return None
    stats = None if result.stats is None else result.stats.select(wanted)
    return sample(_select_rows(result.logits_RV, wanted), rows, stats)


def _rewards(heads: RewardHeads, hidden_H: Tensor) -> list[float]:
    # Row by row, so that company cannot change a reward's bits.
    rewards_J = torch.mv(heads.weight_JH.to(hidden_H.dtype), hidden_H) + heads.bias_J
    values: list[float] = rewards_J.tolist()
    return values


def _select_rows(logits_RV: Tensor, rows: list[int]) -> Tensor:
    # In the common case every logit row is sampled once, in order: no copy.
    if rows == list(range(logits_RV.shape[0])):
        return logits_RV
    return logits_RV[torch.tensor(rows)]


def _score(logits_RV: Tensor, scored: ScoredRows) -> tuple[Sequence, list[float]]:
    start, end = scored.target_start, scored.target_start + scored.num_rows
    rows_RV = logits_RV[scored.row_start : scored.row_start + scored.num_rows]
    return scored.sequence, token_logprobs(rows_RV, scored.sequence.token_ids[start:end])

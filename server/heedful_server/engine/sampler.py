"""From logits to tokens: every sampling parameter of the contract, for a batch of unlike rows.

Owns the order of the steps and the by-products; the edits are in penalties.py, the distribution and
its noise in heedful_kernels.sample_reference. It knows nothing of sequences, text or scheduling.
Runs in the engine child's main thread, on the device of the logits.

For each row, from fp32 logits (fp64 stays fp64):
  1. raw log-probs: log-softmax of the model's logits, for `logprobs` and `top`;
  2. logit bias is added;
  3. repetition penalty: tokens of prompt and completion;
  4. presence and frequency penalty: tokens of the completion;
  5. before min_tokens, the tokens that would end the completion are forbidden;
  6. the constraint's bitmask; where the two leave nothing (the grammar has ended before
     min_tokens), step 5 is undone: a whole answer is worth more than one that cannot go on;
  7. temperature 0: the token of the highest logit, ties by lower id. Otherwise temperature,
     softmax, min-p, top-k and top-p on the tempered probabilities, renormalisation, and the draw
     keyed by (seed, sample index, position).

By-products: raw log-prob; sampling log-prob (under the truncated, renormalised distribution that
was drawn from; 0 when greedy); kept mass (the share of the tempered distribution that truncation
kept; 1 when greedy). A row's results are the same bits whatever the other rows are. A row that
cannot be sampled gets an error of its own, and the others go on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from heedful_kernels.sample_reference import DrawSettings, draw, row_key
from torch import Tensor

from heedful_server.engine.penalties import (
    add_bias,
    apply_mask,
    forbid,
    penalize_occurrence,
    penalize_repetition,
)
from heedful_server.model.batch import RowStats
from heedful_server.protocol import SamplingParams

FAILED_TOKEN_ID = -1
NOT_FINITE_ERROR = "the model's logits are not finite"
NONE_ALLOWED_ERROR = "no token is allowed: logit bias and constraint exclude every one"


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What one row is sampled with.

    Attributes:
        params: the request's sampling parameters.
        sample_idx: position among the request's n completions.
        position: how many tokens of the completion exist already.
        prompt_token_ids: the prompt.
        completion_token_ids: tokens sampled so far; the sampler only reads them.
        token_mask: int32 [ceil(V / 32)], token i is bit i % 32 of word i // 32; None allows all.
        eos_token_ids: ids that end a completion unless params.ignore_eos.
    """

    params: SamplingParams
    sample_idx: int
    position: int
    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    token_mask: Tensor | None
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was sampled; every list runs parallel to the rows.

    Where errors[row] is a message instead of None, the row has the token FAILED_TOKEN_ID, NaN for
    its numbers and no alternatives.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    kept_mass: list[float]
    top: list[list[tuple[int, float]]]
    errors: list[str | None]


def sample(
    logits_RV: Tensor, rows: Sequence[SamplerRow], stats: RowStats | None = None
) -> SampledTokens:
    """Sample one token for every row; logits_RV [R, V] is left as it is.

    With stats, greedy rows that are asked for nothing else are read off them, each whatever the
    other rows are.
    """
    assert logits_RV.shape[0] == len(rows), "one row of logits for each sampler row"
    if stats is None:
        return _sample_all(logits_RV, rows)
    plain = [_is_plain_greedy(row) for row in rows]
    others = [idx for idx, is_plain in enumerate(plain) if not is_plain]
    if len(others) == len(rows):
        return _sample_all(logits_RV, rows)
    sampled = _read_off(stats)
    if others:
        put(sampled, others, _sample_all(logits_RV[others], [rows[idx] for idx in others]))
    return sampled


def _sample_all(logits_RV: Tensor, rows: Sequence[SamplerRow]) -> SampledTokens:
    if logits_RV.dtype not in (torch.float32, torch.float64):
        logits_RV = logits_RV.float()
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    edited_RV = _edited(logits_RV, rows)
    errors = _errors(logits_RV, edited_RV)
    sampled = SampledTokens(
        token_ids=[FAILED_TOKEN_ID] * len(rows),
        logprobs=[math.nan] * len(rows),
        sampling_logprobs=[math.nan] * len(rows),
        kept_mass=[math.nan] * len(rows),
        top=[[] for _ in rows],
        errors=errors,
    )
    healthy = [idx for idx in range(len(rows)) if errors[idx] is None]
    _take_greedy(sampled, edited_RV, [i for i in healthy if rows[i].params.temperature == 0.0])
    _take_drawn(sampled, edited_RV, rows, [i for i in healthy if rows[i].params.temperature > 0.0])
    _add_logprobs(sampled, logprobs_RV, rows, healthy)
    return sampled


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Return the raw log-prob of one token in every row, the same bits as sample() gives."""
    if logits_RV.dtype not in (torch.float32, torch.float64):
        logits_RV = logits_RV.float()
    ids_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    logprobs: list[float] = torch.log_softmax(logits_RV, dim=-1).gather(1, ids_R1)[:, 0].tolist()
    return logprobs


def _is_plain_greedy(row: SamplerRow) -> bool:
    params = row.params
    return params.temperature == 0.0 and params.top_logprobs == 0 and not _needs_edits(row)


def _read_off(stats: RowStats) -> SampledTokens:
    token_ids: list[int] = stats.argmax_R.tolist()
    raw_max: list[float] = stats.max_R.tolist()
    lse: list[float] = stats.lse_R.tolist()
    errors = [
        None if token_id >= 0 and math.isfinite(best) else NOT_FINITE_ERROR
        for token_id, best in zip(token_ids, raw_max, strict=True)
    ]
    bad = [error is not None for error in errors]
    return SampledTokens(
        token_ids=[
            FAILED_TOKEN_ID if failed else token_id
            for token_id, failed in zip(token_ids, bad, strict=True)
        ],
        logprobs=[
            math.nan if failed else best - total
            for best, total, failed in zip(raw_max, lse, bad, strict=True)
        ],
        sampling_logprobs=[math.nan if failed else 0.0 for failed in bad],
        kept_mass=[math.nan if failed else 1.0 for failed in bad],
        top=[[] for _ in bad],
        errors=errors,
    )


def put(sampled: SampledTokens, rows: list[int], part: SampledTokens) -> None:
    """Put what was sampled for some rows in their places."""
    for position, idx in enumerate(rows):
        sampled.token_ids[idx] = part.token_ids[position]
        sampled.logprobs[idx] = part.logprobs[position]
        sampled.sampling_logprobs[idx] = part.sampling_logprobs[position]
        sampled.kept_mass[idx] = part.kept_mass[position]
        sampled.top[idx] = part.top[position]
        sampled.errors[idx] = part.errors[position]


def _edited(logits_RV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    edited_rows = [idx for idx, row in enumerate(rows) if _needs_edits(row)]
    if not edited_rows:
        return logits_RV
    edited_RV = logits_RV.clone()
    for idx in edited_rows:
        _edit(edited_RV[idx], rows[idx])
    return edited_RV


def _needs_edits(row: SamplerRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or row.position < params.min_tokens
        or row.token_mask is not None
    )


def _edit(logits_V: Tensor, row: SamplerRow) -> None:
    params = row.params
    if params.logit_bias:
        add_bias(logits_V, params.logit_bias)
    if params.repetition_penalty != 1.0:
        seen = {*row.prompt_token_ids, *row.completion_token_ids}
        penalize_repetition(logits_V, params.repetition_penalty, seen)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        penalize_occurrence(
            logits_V, params.presence_penalty, params.frequency_penalty, row.completion_token_ids
        )
    if row.token_mask is not None:
        apply_mask(logits_V, row.token_mask)
    if row.position < params.min_tokens:
        _forbid_ending(logits_V, row)


def ending_ids(row: SamplerRow) -> set[int]:
    """Tokens that would end the completion."""
    ending = set(row.params.stop_token_ids)
    return ending if row.params.ignore_eos else ending | row.eos_token_ids


def _forbid_ending(logits_V: Tensor, row: SamplerRow) -> None:
    ending = ending_ids(row)
    if row.token_mask is None:
        forbid(logits_V, ending)
        return
    # The mask is applied first, so that what forbidding would leave is known; the two commute.
    open_V = logits_V.clone()
    forbid(open_V, ending)
    if open_V.amax() > -math.inf:
        logits_V.copy_(open_V)


def _errors(logits_RV: Tensor, edited_RV: Tensor) -> list[str | None]:
    # amax hands NaN on. A raw row at -inf throughout has no distribution either.
    raw_max: list[float] = logits_RV.amax(dim=-1).tolist()
    edited_max = raw_max if edited_RV is logits_RV else edited_RV.amax(dim=-1).tolist()
    errors: list[str | None] = []
    for raw, edited in zip(raw_max, edited_max, strict=True):
        if not math.isfinite(raw) or (not math.isfinite(edited) and edited != -math.inf):
            errors.append(NOT_FINITE_ERROR)
        else:
            errors.append(NONE_ALLOWED_ERROR if edited == -math.inf else None)
    return errors


def _take_greedy(sampled: SampledTokens, logits_RV: Tensor, rows: list[int]) -> None:
    if not rows:
        return
    token_ids = _select(logits_RV, rows).argmax(dim=-1).tolist()
    for idx, token_id in zip(rows, token_ids, strict=True):
        sampled.token_ids[idx] = token_id
        sampled.sampling_logprobs[idx] = 0.0
        sampled.kept_mass[idx] = 1.0


def _take_drawn(
    sampled: SampledTokens, logits_RV: Tensor, rows: Sequence[SamplerRow], drawn: list[int]
) -> None:
    if not drawn:
        return
    draws = draw(_select(logits_RV, drawn), [_settings(rows[idx]) for idx in drawn])
    for idx, result in zip(drawn, draws, strict=True):
        sampled.token_ids[idx] = result.token_id
        sampled.sampling_logprobs[idx] = result.logprob
        sampled.kept_mass[idx] = result.kept_mass


def _settings(row: SamplerRow) -> DrawSettings:
    params = row.params
    return DrawSettings(
        key=row_key(params.seed, row.sample_idx, row.position),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def _add_logprobs(
    sampled: SampledTokens, logprobs_RV: Tensor, rows: Sequence[SamplerRow], healthy: list[int]
) -> None:
    if not healthy:
        return
    index = torch.tensor(healthy, device=logprobs_RV.device)
    ids = torch.tensor([sampled.token_ids[idx] for idx in healthy], device=logprobs_RV.device)
    for idx, logprob in zip(healthy, logprobs_RV[index, ids].tolist(), strict=True):
        sampled.logprobs[idx] = logprob
        if rows[idx].params.top_logprobs:
            sampled.top[idx] = _most_probable(logprobs_RV[idx], rows[idx].params.top_logprobs)


def _most_probable(logprobs_V: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the count most probable tokens, best first, ties by lower id."""
    count = min(count, len(logprobs_V))
    # topk leaves open which of several equal values it takes: all of them are ranked here.
    ids_K = (logprobs_V >= logprobs_V.topk(count).values[-1]).nonzero()[:, 0]
    ranked = torch.sort(logprobs_V[ids_K], descending=True, stable=True)
    ids_K = ids_K[ranked.indices]
    return list(zip(ids_K[:count].tolist(), ranked.values[:count].tolist(), strict=True))


def _select(logits_RV: Tensor, rows: list[int]) -> Tensor:
    return logits_RV if len(rows) == logits_RV.shape[0] else logits_RV[rows]

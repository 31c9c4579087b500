"""Drawing a token for every row of logits, edits and by-products included, on the device.

The distribution, its ties, its noise and the order of the edits are those of sample_reference.py
and of `sample_reference_batch` below, which states them in torch operators:

  x' = x + bias; repetition penalty (in fp64); minus presence + frequency * count; mask
  t = (x' - max x') / T, weights exp(t); kept is the shortest prefix of the ranking by t (ties by
  lower id) that min-p, top-k or top-p ends; drawn is argmax exp(t) / E over the kept tokens.
  T = 0: the highest x', ties by lower id.

On a GPU a row of logits is read once where the distribution allows. One walk keeps running maxima
and sums (of the raw logits, for the raw log-prob, and of the tempered ones), and
  - for an untruncated row runs the race: the best exp(t) / E so far, relative to the running max;
  - for a truncated row writes down the candidates: tokens within `depth` nats (or -log min_p) of
    the running maximum, a threshold that only rises.
A second kernel finds where the prefix ends among the candidates, by halving the range of t's bits
over sums of 2^44-ths in int64 (order-free, as in the reference), and draws among the kept: noise is
computed for survivors only. Where the prefix does not end within the candidates, or they are more
than there is room for, the row takes a counted second pass of two more reads: a histogram of t
brackets the end, then what ranks before the bracket is summed and raced exactly and the bracket's
own tokens become the candidates. Should that overflow too, a slow third way follows (see `passes`).

Bias and penalties come as sparse lists: listed tokens are edited first, into a list of candidates
of their own, and marked in a bitmap that keeps the walk from counting them twice. Logits are left
as they are. Nothing is synchronised with the host.

What differs from the reference: the total mass is an fp32 sum, good to about 1e-6, so a token whose
preceding mass is that close to top_p may fall on either side; exp is the device's.

Pure functions, any thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from heedful_kernels import sample_kernels as kernels
from heedful_kernels import sample_passes as passes
from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    cdiv,
    next_power_of_2,
    refuse_unless,
    runs_triton,
)
from heedful_kernels.sample_reference import DrawSettings, draw
from heedful_kernels.sample_sizes import Sizes, sizes_for

OK: Final = 0
NOT_FINITE: Final = 1
NONE_ALLOWED: Final = 2

_NAME: Final = "sample"
MAX_VOCAB: Final = 1 << 18
# Nats below the maximum that candidates of a top-k or top-p row are written down from.
_DEPTH: Final = 10.0
_MAX_EDITS: Final = 2048
_BUCKETS: Final = 2048


@dataclass(frozen=True, slots=True)
class SampleEdits:
    """Sparse edits: the tokens of each row whose logits change, each listed once.

    Attributes:
        token_ids_RE: int32 [R, E]; entries outside [0, V) are passed over (pad with -1).
        bias_RE: fp32; -inf forbids a token.
        counts_RE: int32, occurrences in the completion.
        seen_RE: bool, whether it occurs in prompt or completion.
        repetition_R: fp64 [R], 1 for none.
        presence_R: fp64 [R], 0 for none.
        frequency_R: fp64 [R], 0 for none.
    """

    token_ids_RE: Tensor
    bias_RE: Tensor
    counts_RE: Tensor
    seen_RE: Tensor
    repetition_R: Tensor
    presence_R: Tensor
    frequency_R: Tensor


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How every row is drawn; all tensors contiguous and on the logits' device.

    Attributes:
        keys_R2: int32 [R, 2], the bits of sample_reference.row_key.
        temperature_R: fp32 [R]; 0 takes the highest logit.
        top_k_R: int32 [R]; 0 keeps all.
        top_p_R: fp64 [R], above 0; 1 keeps all.
        log_min_p_R: fp32 [R], log(min_p); -inf keeps all.
        edits: None when no row has any.
        allowed_RW: int32 [R, ceil(V / 32)], token i is bit i % 32 of word i // 32; None allows all.
    """

    keys_R2: Tensor
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    log_min_p_R: Tensor
    edits: SampleEdits | None = None
    allowed_RW: Tensor | None = None


class Sampled(NamedTuple):
    """What was drawn, [R] each.

    Rows whose status is not OK have token -1 and NaN.
    """

    token_ids_R: Tensor  # int64
    logprobs_R: Tensor  # fp32, of the raw logits at T = 1
    sampling_logprobs_R: Tensor  # fp32, under what was drawn from; 0 when greedy
    kept_mass_R: Tensor  # fp32, share of the tempered distribution that was kept; 1 when greedy
    status_R: Tensor  # int32: OK, NOT_FINITE or NONE_ALLOWED
    passes_R: Tensor  # int32: 1, or 2 or 3 where the prefix was long (see above)


def sample(logits_RV: Tensor, settings: SampleSettings, *, fixed_splits: bool = False) -> Sampled:
    """Draw one token for every row.

    Args:
        logits_RV: bf16, fp16 or fp32 (fp64 by the reference), unit stride along rows, V <= 2^18.
        settings: of the R rows; widths of edits that occur again and again are compiled for once.
        fixed_splits: cut rows up alike for every R, for bits that do not depend on the batch.

    Raises:
        RefusedInputError: shapes or dtypes do not go together.
    """
    _check(logits_RV, settings)
    edits = settings.edits
    return Sampled(
        *_op(
            logits_RV,
            settings.keys_R2,
            settings.temperature_R,
            settings.top_k_R,
            settings.top_p_R,
            settings.log_min_p_R,
            [] if edits is None else _edit_tensors(edits),
            settings.allowed_RW,
            fixed_splits,
        )
    )


def sample_reference_batch(logits_RV: Tensor, settings: SampleSettings) -> Sampled:
    """The same in torch operators, a row at a time."""
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    edited_RV = torch.empty_like(logits_RV)
    for row in range(len(logits_RV)):
        edited_RV[row] = _edited(logits_RV, settings, row)
    logp_RV = torch.log_softmax(logits_RV, dim=-1)
    rows: list[tuple[int, float, float, float, int, int]] = []
    for row in range(len(logits_RV)):
        raw_max, edited_max = float(logits_RV[row].amax()), float(edited_RV[row].amax())
        if not math.isfinite(raw_max) or (not math.isfinite(edited_max) and edited_max > -math.inf):
            rows.append((-1, math.nan, math.nan, math.nan, NOT_FINITE, 1))
        elif edited_max == -math.inf or math.isnan(edited_max):
            status = NOT_FINITE if math.isnan(edited_max) else NONE_ALLOWED
            rows.append((-1, math.nan, math.nan, math.nan, status, 1))
        else:
            token, sampling_logprob, kept = _drawn(edited_RV[row], settings, row)
            rows.append((token, float(logp_RV[row, token]), sampling_logprob, kept, OK, 1))
    dtypes = (torch.int64, *[torch.float32] * 3, torch.int32, torch.int32)
    columns = zip(*rows, strict=True) if rows else [()] * 6
    return Sampled(
        *(
            torch.tensor(column, dtype=dtype, device=logits_RV.device)
            for column, dtype in zip(columns, dtypes, strict=True)
        )
    )


def _drawn(logits_V: Tensor, settings: SampleSettings, row: int) -> tuple[int, float, float]:
    temperature = float(settings.temperature_R[row])
    if temperature == 0.0:
        return int(logits_V.argmax()), 0.0, 1.0
    key = settings.keys_R2[row].tolist()
    result = draw(
        logits_V[None],
        [
            DrawSettings(
                (key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF),
                temperature,
                int(settings.top_k_R[row]),
                float(settings.top_p_R[row]),
                math.exp(float(settings.log_min_p_R[row])),
            )
        ],
    )[0]
    return result.token_id, result.logprob, result.kept_mass


def _edited(logits_RV: Tensor, settings: SampleSettings, row: int) -> Tensor:
    logits_V = logits_RV[row].clone()
    edits = settings.edits
    if edits is not None:
        ids_E = edits.token_ids_RE[row]
        ok_E = (ids_E >= 0) & (ids_E < len(logits_V))
        ids_E = ids_E[ok_E].long()
        x_E = logits_V[ids_E] + edits.bias_RE[row, ok_E]
        penalty = edits.repetition_R[row]
        wide_E = x_E.double()
        wide_E = torch.where(wide_E > 0, wide_E / penalty, wide_E * penalty).clamp(max=1e30)
        x_E = torch.where(edits.seen_RE[row, ok_E] & (penalty != 1.0), wide_E.to(x_E.dtype), x_E)
        counts_E = edits.counts_RE[row, ok_E]
        cost_E = (edits.presence_R[row] + edits.frequency_R[row] * counts_E).to(x_E.dtype)
        logits_V[ids_E] = torch.where(counts_E > 0, x_E - cost_E, x_E)
    if settings.allowed_RW is not None:
        bits_32 = torch.arange(32, dtype=torch.int32, device=logits_V.device)
        allowed_V = (settings.allowed_RW[row][:, None] >> bits_32 & 1).flatten()[: len(logits_V)]
        logits_V.masked_fill_(allowed_V == 0, -math.inf)
    return logits_V


def _check(logits_RV: Tensor, settings: SampleSettings) -> None:
    refuse_unless(
        logits_RV.dim() == 2
        and logits_RV.is_floating_point()
        and 0 < logits_RV.shape[1] <= MAX_VOCAB
        and logits_RV.stride(1) == 1,
        _NAME,
        f"logits must be a float [R, V] with contiguous rows, V up to {MAX_VOCAB}, not "
        f"{logits_RV.dtype} {tuple(logits_RV.shape)}",
    )
    rows, words = len(logits_RV), cdiv(logits_RV.shape[1], 32)
    wanted: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("keys", settings.keys_R2, torch.int32, (rows, 2)),
        ("temperature", settings.temperature_R, torch.float32, (rows,)),
        ("top_k", settings.top_k_R, torch.int32, (rows,)),
        ("top_p", settings.top_p_R, torch.float64, (rows,)),
        ("log_min_p", settings.log_min_p_R, torch.float32, (rows,)),
    ]
    if settings.allowed_RW is not None:
        wanted.append(("allowed", settings.allowed_RW, torch.int32, (rows, words)))
    edits = settings.edits
    if edits is not None:
        shape: tuple[int, ...] = (rows, edits.token_ids_RE.shape[-1])
        wanted += [
            ("token_ids", edits.token_ids_RE, torch.int32, shape),
            ("bias", edits.bias_RE, torch.float32, shape),
            ("counts", edits.counts_RE, torch.int32, shape),
            ("seen", edits.seen_RE, torch.bool, shape),
            ("repetition", edits.repetition_R, torch.float64, (rows,)),
            ("presence", edits.presence_R, torch.float64, (rows,)),
            ("frequency", edits.frequency_R, torch.float64, (rows,)),
        ]
    for name, tensor, dtype, size in wanted:
        refuse_unless(
            tensor.dtype == dtype and tensor.shape == size and tensor.is_contiguous(),
            _NAME,
            f"{name} must be a contiguous {dtype} {list(size)}, not {tensor.dtype} "
            f"{list(tensor.shape)}",
        )
        refuse_unless(tensor.device == logits_RV.device, _NAME, f"{name} is on another device")


def _edit_tensors(edits: SampleEdits) -> list[Tensor]:
    return [
        edits.token_ids_RE,
        edits.bias_RE,
        edits.counts_RE,
        edits.seen_RE,
        edits.repetition_R,
        edits.presence_R,
        edits.frequency_R,
    ]


@torch.library.custom_op("heedful::sample", mutates_args=())
def _op(
    logits_RV: Tensor,
    keys_R2: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    log_min_p_R: Tensor,
    edits: list[Tensor],
    allowed_RW: Tensor | None,
    fixed_splits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    record = SampleEdits(*edits) if edits else None
    settings = SampleSettings(
        keys_R2, temperature_R, top_k_R, top_p_R, log_min_p_R, record, allowed_RW
    )
    num_edits = edits[0].shape[1] if edits else 0
    unsupported = "" if logits_RV.dtype in FLOATS else "dtype"
    unsupported = unsupported or ("many_edits" if num_edits > _MAX_EDITS else "")
    if len(logits_RV) == 0 or not runs_triton(_NAME, logits_RV, unsupported):
        return tuple(sample_reference_batch(logits_RV, settings))  # type: ignore[return-value]
    sizes = sizes_for(logits_RV, num_edits, fixed_splits=fixed_splits)
    return tuple(_launch(logits_RV, settings, sizes))  # type: ignore[return-value]


def _launch(logits_RV: Tensor, settings: SampleSettings, sizes: Sizes) -> Sampled:
    rows, device = len(logits_RV), logits_RV.device

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    out = Sampled(
        empty(rows, dtype=torch.int64),
        *(empty(rows, dtype=torch.float32) for _ in range(3)),
        *(empty(rows, dtype=torch.int32) for _ in range(2)),
    )
    row = {
        "stats": empty(rows, sizes.splits, kernels.STATS, dtype=torch.float32),
        "marks": empty(rows, sizes.splits, kernels.MARKS, dtype=torch.int32),
        "found_ids": empty(rows, sizes.lanes, dtype=torch.int32),
        "found_values": empty(rows, sizes.lanes, dtype=torch.float32),
        "flags": empty(rows, dtype=torch.int32),
        "rows_m": empty(rows, dtype=torch.float32),
        "rows_total": empty(rows, dtype=torch.float64),
        "certain_units": empty(rows, sizes.splits, dtype=torch.int64),
        "certain_kept": empty(rows, sizes.splits, dtype=torch.int64),
        "certain_counts": empty(rows, sizes.splits, dtype=torch.int32),
        "certain_scores": empty(rows, sizes.splits, dtype=torch.float32),
        "certain_ids": empty(rows, sizes.splits, dtype=torch.int32),
        "histogram": empty(rows, sizes.splits, _BUCKETS, dtype=torch.int32),
        "brackets": empty(rows, 2, dtype=torch.int32),
    }
    _Launcher(logits_RV, settings, sizes, row, out).run()
    return out


class _Launcher:
    """One batch on its way through the kernels."""

    def __init__(
        self,
        logits_RV: Tensor,
        settings: SampleSettings,
        sizes: Sizes,
        row: dict[str, Tensor],
        out: Sampled,
    ) -> None:
        self._logits, self._sizes, self._row, self._out = logits_RV, sizes, row, out
        self._rows, self._vocab = logits_RV.shape
        self._words = cdiv(self._vocab, 32)
        self._settings = settings
        has_edits, has_mask = settings.edits is not None, settings.allowed_RW is not None
        self._edited = (
            torch.zeros(self._rows, self._words, dtype=torch.int32, device=logits_RV.device)
            if has_edits
            else row["marks"]
        )
        self._allowed = settings.allowed_RW if settings.allowed_RW is not None else row["marks"]
        self._walk: dict[str, Any] = {
            "logits": logits_RV,
            "temperature": settings.temperature_R,
            "edited": self._edited,
            "allowed": self._allowed,
            "found_ids": row["found_ids"],
            "found_values": row["found_values"],
            "logits_stride": logits_RV.stride(0),
            "V": self._vocab,
            "W": self._words,
            "row_found": sizes.lanes,
            "EDITS": has_edits,
            "MASK": has_mask,
            "BLOCK": sizes.block,
            **COMPILE,
        }
        self._edit_lanes = {
            "E": sizes.edits,
            "segment": sizes.segment,
            "BLOCK_E": max(16, next_power_of_2(sizes.edits)),
        }

    def run(self) -> None:
        """Launch every kernel."""
        self._edit()
        self._scan()
        self._decide(second=False)
        self._collect()
        self._decide(second=True)
        self._finish()

    def _edit(self) -> None:
        edits = self._settings.edits
        if edits is None or self._sizes.edits == 0:
            return
        kernels.edit_kernel[(self._rows,)](
            self._logits, edits.token_ids_RE, edits.bias_RE, edits.counts_RE,
            edits.seen_RE.view(torch.int8),
            edits.repetition_R, edits.presence_R, edits.frequency_R, self._allowed,
            self._row["found_ids"], self._row["found_values"], self._edited,
            self._logits.stride(0), self._vocab, self._words, self._sizes.edits,
            self._sizes.segment, self._sizes.lanes,
            MASK=self._walk["MASK"], BLOCK_E=self._edit_lanes["BLOCK_E"], **COMPILE,
        )  # fmt: skip

    def _scan(self) -> None:
        settings, row = self._settings, self._row
        kernels.scan_kernel[(self._sizes.splits, self._rows)](
            **self._walk, keys=settings.keys_R2, top_k=settings.top_k_R, top_p=settings.top_p_R,
            log_min_p=settings.log_min_p_R, stats=row["stats"], marks=row["marks"],
            per_split=self._sizes.per_split, depth=_DEPTH, CAPACITY=self._sizes.capacity,
            STATS=kernels.STATS, MARKS=kernels.MARKS, num_warps=8,
        )  # fmt: skip

    def _decide(self, *, second: bool) -> None:
        settings, row, out = self._settings, self._row, self._out
        kernels.decide_kernel[(self._rows,)](
            self._logits, settings.keys_R2, settings.temperature_R, settings.top_k_R,
            settings.top_p_R, settings.log_min_p_R,
            row["stats"], row["marks"], row["found_ids"], row["found_values"], row["flags"],
            row["rows_m"], row["rows_total"], row["certain_units"], row["certain_kept"],
            row["certain_counts"], row["certain_scores"], row["certain_ids"], *out,
            self._logits.stride(0), self._vocab, self._sizes.edits, self._sizes.segment,
            self._sizes.lanes, _DEPTH, self._sizes.splits,
            SECOND=second, CAPACITY=self._sizes.capacity,
            STATS=kernels.STATS, MARKS=kernels.MARKS, SPLITS=next_power_of_2(self._sizes.splits),
            BLOCK_E=self._edit_lanes["BLOCK_E"], LANES=self._sizes.lanes, num_warps=8, **COMPILE,
        )  # fmt: skip

    def _collect(self) -> None:
        settings, row = self._settings, self._row
        grid = (self._sizes.splits, self._rows)
        shared = {"flags": row["flags"], "rows_m": row["rows_m"]}
        passes.histogram_kernel[grid](
            **self._walk, **self._edit_lanes, **shared, histogram=row["histogram"],
            per_split=self._sizes.per_split, BUCKETS=_BUCKETS, num_warps=8,
        )  # fmt: skip
        passes.bracket_kernel[(self._rows,)](
            settings.top_k_R, settings.top_p_R, row["flags"], row["rows_total"], row["histogram"],
            row["brackets"], self._sizes.splits, BUCKETS=_BUCKETS, **COMPILE,
        )  # fmt: skip
        certain = {name: tensor for name, tensor in row.items() if name.startswith("certain_")}
        passes.collect_kernel[grid](
            **self._walk, **shared, **certain, keys=settings.keys_R2,
            log_min_p=settings.log_min_p_R, brackets=row["brackets"], marks=row["marks"],
            per_split=self._sizes.per_split, CAPACITY=self._sizes.capacity,
            MARKS=kernels.MARKS, BUCKETS=_BUCKETS, num_warps=8,
        )  # fmt: skip

    def _finish(self) -> None:
        settings, row, out = self._settings, self._row, self._out
        passes.last_kernel[(self._rows,)](
            **self._walk, **self._edit_lanes, keys=settings.keys_R2, top_k=settings.top_k_R,
            top_p=settings.top_p_R, log_min_p=settings.log_min_p_R, flags=row["flags"],
            rows_m=row["rows_m"], rows_total=row["rows_total"], tokens=out.token_ids_R,
            logprobs=out.logprobs_R, sampling_logprobs=out.sampling_logprobs_R,
            kept_masses=out.kept_mass_R, statuses=out.status_R, passes=out.passes_R, num_warps=8,
        )  # fmt: skip


@_op.register_fake
def _(
    logits_RV: Tensor,
    keys_R2: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    log_min_p_R: Tensor,
    edits: list[Tensor],
    allowed_RW: Tensor | None,
    fixed_splits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits_RV.shape[0]
    floats = [logits_RV.new_empty(rows, dtype=torch.float32) for _ in range(3)]
    marks = [logits_RV.new_empty(rows, dtype=torch.int32) for _ in range(2)]
    tokens = logits_RV.new_empty(rows, dtype=torch.int64)
    return tokens, floats[0], floats[1], floats[2], marks[0], marks[1]

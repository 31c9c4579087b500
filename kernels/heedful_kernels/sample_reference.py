"""Drawing a token: the reference in torch operators for what a fused kernel must return.

Owns the noise, the truncated distribution and the draw. It deliberately knows nothing of requests,
penalties or constraints: logits arrive edited, and every row has its own settings. Pure functions,
any device; the engine child calls them between two forward passes.

**Distribution.** For a row x of logits, temperature T > 0 and t = (x - max x) / T, the tempered
probability of token i is proportional to exp(t_i). Tokens are ranked by t, ties by lower id. Each
of the three truncations keeps a prefix of that ranking, computed on the tempered probabilities
before any of them is applied; what is drawn from is the shortest prefix, renormalised:
  min-p  keeps t_i >= log(min_p), that is p_i >= min_p * max p;
  top-k  keeps the first k tokens; 0 keeps all;
  top-p  keeps the shortest prefix whose probability reaches top_p; 1 keeps all.

**Sums** are taken over floor(exp(t_i) * 2^44) in int64. Integer addition is associative, so masses,
and with them every decision of top-p, are the same bits in any order, batch, thread count or code
path. The largest weight is 2^44 exactly; floor() loses less than 2^-26 of the total in up to 2^18
tokens.

**Noise.** Token i of a row gets E_i ~ Exp(1), and the draw is argmax exp(t_i) / E_i over the kept
tokens (ties: lowest id), which is argmax(log p_i - log E_i), the Gumbel-max rule: token i wins with
probability p_i. E_i depends on (seed, sample index, position, token id) and on nothing else, hence
neither on the batch nor, other than by leaving tokens out, on the truncation. With 32-bit unsigned
arithmetic (wrapping; >> shifts in zeros):
  mix(h)  h ^= h >> 16; h *= 0x21F0AAAD; h ^= h >> 15; h *= 0xD35A2D97; h ^= h >> 15
  key_j   h = IV_j; for w in (seed & 0xFFFFFFFF, seed >> 32, sample, position): h = mix(h ^ w)
          where IV_0 = 0x243F6A88, IV_1 = 0x85A308D3
  hash_i  h = i * 0x9E3779B9 + key_0; h ^= h >> 16; h *= 0x21F0AAAD; h += key_1;
          h ^= h >> 15; h *= 0xD35A2D97; h ^= h >> 15
  u_i     min(((hash_i & 0x7FFFFFFF) + 0.5) * 2^-31, 1 - 2^-24) in fp32
  E_i     -log1p(-u_i), between 2^-32 and 16.7: never 0, never infinite
u is fine-grained where it is small, which is where E decides whether an improbable token wins. The
hash is the same on every device; log1p may differ in its last bit, which can tip only a near-tie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0xD35A2D97
_GOLDEN = 0x9E3779B9
_KEY_SEEDS = (0x243F6A88, 0x85A308D3)

_UNIT_BITS = 44
_MAX_VOCAB = 1 << 18
_MIN_TEMPERATURE = 1e-30

# Speed only, never results: rows worked on at a time (the temporaries of a block stay in the
# cache), candidates tried before a row is ranked in full, and the resolution of that ranking.
_BLOCK_ROWS = 4
_NUM_CANDIDATES = 256
_NUM_BUCKETS = 4096
_BUCKETS_PER_NAT = 128


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How one row is drawn; temperature is above 0, key comes from row_key."""

    key: tuple[int, int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether any token with a finite logit may be left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token, its log-prob under the distribution that it was drawn from, and the mass of
    the tempered distribution that truncation kept.
    """

    token_id: int
    logprob: float
    kept_mass: float


def row_key(seed: int, sample_idx: int, position: int) -> tuple[int, int]:
    """Return the two 32-bit keys of a row; seed is taken modulo 2^64, the others modulo 2^32."""
    words = (seed & _MASK_32, seed >> 32 & _MASK_32, sample_idx & _MASK_32, position & _MASK_32)
    keys = []
    for hashed in _KEY_SEEDS:
        for word in words:
            hashed = _mix(hashed ^ word)
        keys.append(hashed)
    return keys[0], keys[1]


def exponential_noise(keys: Sequence[tuple[int, int]], token_ids_RK: Tensor) -> Tensor:
    """Return E ~ Exp(1) for every row and token id, fp32 [R, K].

    Args:
        keys: one for each row.
        token_ids_RK: ids, integer [R, K] or [1, K] for the same ids in every row.
    """
    keys_R2 = torch.tensor(
        [[_signed(word) for word in key] for key in keys],
        dtype=torch.int32,
        device=token_ids_RK.device,
    )
    # int32 multiplication wraps as uint32's does; torch has no complete uint32 arithmetic.
    hashed_RK = token_ids_RK.to(torch.int32) * _signed(_GOLDEN) + keys_R2[:, :1]
    shifted_RK = torch.empty_like(hashed_RK)
    _xor_shift(hashed_RK, 16, shifted_RK)
    hashed_RK.mul_(_MULTIPLIER_1).add_(keys_R2[:, 1:])
    _xor_shift(hashed_RK, 15, shifted_RK)
    hashed_RK.mul_(_signed(_MULTIPLIER_2))
    _xor_shift(hashed_RK, 15, shifted_RK)
    uniform_RK = hashed_RK.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return uniform_RK.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_()


def _xor_shift(hashed_RK: Tensor, bits: int, scratch_RK: Tensor) -> None:
    # int32's shift copies the sign; the mask makes it a shift of unsigned numbers.
    torch.bitwise_right_shift(hashed_RK, bits, out=scratch_RK)
    hashed_RK.bitwise_xor_(scratch_RK.bitwise_and_((1 << 32 - bits) - 1))


def draw(logits_RV: Tensor, settings: Sequence[DrawSettings]) -> list[Draw]:
    """Draw one token for every row.

    Args:
        logits_RV: fp32 or fp64 [R, V], V at most 2^18; in each row the maximum is finite, and
            tokens at -inf are never drawn.
        settings: one for each row.
    """
    num_rows, vocab_size = logits_RV.shape
    assert len(settings) == num_rows
    assert vocab_size <= _MAX_VOCAB, f"sums may overflow beyond {_MAX_VOCAB} tokens"
    draws: list[Draw] = []
    for start in range(0, num_rows, _BLOCK_ROWS):
        end = start + _BLOCK_ROWS
        draws += _draw_block(logits_RV[start:end], settings[start:end])
    return draws


@dataclass(frozen=True, slots=True)
class _Block:
    """Tempered logits of some rows, their weights in float and in units, and the units' sums."""

    tempered_RV: Tensor
    weights_RV: Tensor
    units_RV: Tensor
    totals: list[int]


@dataclass(frozen=True, slots=True)
class _Limits:
    """The three truncations of one row as limits on rank, on the units ranked before, and on t."""

    rank: int
    units: int
    tempered: float


def _draw_block(logits_RV: Tensor, settings: Sequence[DrawSettings]) -> list[Draw]:
    temperatures_R1 = torch.tensor(
        [[max(item.temperature, _MIN_TEMPERATURE)] for item in settings],
        dtype=logits_RV.dtype,
        device=logits_RV.device,
    )
    # The maximum goes first: x / T may overflow, (x - max) / T only falls to -inf.
    tempered_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperatures_R1)
    weights_RV = tempered_RV.exp()
    units_RV = (weights_RV * 2.0**_UNIT_BITS).to(torch.int64)
    block = _Block(tempered_RV, weights_RV, units_RV, units_RV.sum(dim=-1).tolist())
    draws: list[Draw | None] = [None] * len(settings)
    full_rows = [row for row, item in enumerate(settings) if not item.truncates]
    cut_rows = [row for row, item in enumerate(settings) if item.truncates]
    if full_rows:
        _draw_untruncated(block, settings, full_rows, draws)
    if cut_rows:
        _draw_truncated(block, settings, cut_rows, draws)
    return [item for item in draws if item is not None]


def _draw_untruncated(
    block: _Block, settings: Sequence[DrawSettings], rows: list[int], draws: list[Draw | None]
) -> None:
    ids_1V = torch.arange(block.weights_RV.shape[1], device=block.weights_RV.device)[None]
    noise_NV = exponential_noise([settings[row].key for row in rows], ids_1V)
    token_ids = (_rows(block.weights_RV, rows) / noise_NV).argmax(dim=-1).tolist()
    for row, token_id in zip(rows, token_ids, strict=True):
        draws[row] = _result(block, row, token_id, block.totals[row])


def _draw_truncated(
    block: _Block, settings: Sequence[DrawSettings], rows: list[int], draws: list[Draw | None]
) -> None:
    """Draw each row from a few candidates, or by itself where it may keep more than those."""
    vocab_size = block.weights_RV.shape[1]
    limits_of_row = {row: _limits(settings[row], block.totals[row], vocab_size) for row in rows}
    few = [row for row in rows if not _keeps_many(limits_of_row[row])]
    if few:
        _draw_from_candidates(block, settings, limits_of_row, few, draws)
    for row in rows:
        if draws[row] is None:
            draws[row] = _draw_wide(block, row, settings[row].key, limits_of_row[row])


def _keeps_many(limits: _Limits) -> bool:
    """Whether the kept prefix is longer than the candidates for sure: one weighs at most a unit."""
    return (
        limits.tempered == -math.inf
        and limits.rank > _NUM_CANDIDATES
        and limits.units > _NUM_CANDIDATES << _UNIT_BITS
    )


def _draw_from_candidates(
    block: _Block,
    settings: Sequence[DrawSettings],
    limits_of_row: dict[int, _Limits],
    rows: list[int],
    draws: list[Draw | None],
) -> None:
    """Draw rows whose kept prefix lies within their most probable tokens; leave the others out."""
    vocab_size = block.weights_RV.shape[1]
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    tempered_NV = _rows(block.tempered_RV, rows)
    top = tempered_NV.topk(num_candidates, dim=-1)
    # topk leaves open which of several equal values it takes and in what order. Ids are put in
    # order, ranked by a stable sort, and trusted only down to the last value, exclusive.
    ids_NK = top.indices.sort(dim=-1).values
    tempered_NK = tempered_NV.gather(1, ids_NK)
    units_NK = _rows(block.units_RV, rows).gather(1, ids_NK)
    keep_NK = _kept_candidates(tempered_NK, units_NK, [limits_of_row[row] for row in rows])
    num_certain_N = (tempered_NK > top.values[:, -1:]).sum(dim=-1)
    certain_N = (keep_NK.sum(dim=-1) <= num_certain_N) | (num_candidates == vocab_size)
    noise_NK = exponential_noise([settings[row].key for row in rows], ids_NK)
    scores_NK = _rows(block.weights_RV, rows).gather(1, ids_NK) / noise_NK
    best_N1 = scores_NK.masked_fill_(~keep_NK, 0.0).argmax(dim=-1, keepdim=True)
    token_ids = ids_NK.gather(1, best_N1)[:, 0].tolist()
    kept_units = units_NK.masked_fill_(~keep_NK, 0).sum(dim=-1).tolist()
    for idx, certain in enumerate(certain_N.tolist()):
        if certain:
            draws[rows[idx]] = _result(block, rows[idx], token_ids[idx], kept_units[idx])


def _limits(item: DrawSettings, total: int, vocab_size: int) -> _Limits:
    return _Limits(
        rank=item.top_k or vocab_size + 1,
        # A token is kept while the units ranked before it fall short of this.
        units=math.ceil(item.top_p * total) if item.top_p < 1.0 else total + 1,
        tempered=math.log(item.min_p) if item.min_p > 0.0 else -math.inf,
    )


def _kept_candidates(tempered_NK: Tensor, units_NK: Tensor, limits: list[_Limits]) -> Tensor:
    """Return which candidates are kept, bool [N, K]; candidates come in order of id."""
    device = tempered_NK.device
    order_NK = torch.sort(tempered_NK, dim=-1, descending=True, stable=True).indices
    ranked_NK = units_NK.gather(1, order_NK)
    before_NK = ranked_NK.cumsum(dim=-1) - ranked_NK
    units_N1 = torch.tensor([[item.units] for item in limits], device=device)
    ranks_N1 = torch.tensor([[item.rank] for item in limits], device=device)
    rank_1K = torch.arange(order_NK.shape[1], device=device)[None]
    keep_ranked_NK = (before_NK < units_N1) & (rank_1K < ranks_N1)
    keep_NK = torch.zeros_like(keep_ranked_NK).scatter_(1, order_NK, keep_ranked_NK)
    floor_N1 = torch.tensor(
        [[item.tempered] for item in limits], dtype=tempered_NK.dtype, device=device
    )
    return keep_NK & (tempered_NK >= floor_N1) & (tempered_NK > -math.inf)


def _draw_wide(block: _Block, row: int, key: tuple[int, int], limits: _Limits) -> Draw:
    """Draw a row whose kept prefix is long."""
    keep_V = _kept_by_buckets(block.tempered_RV[row], block.units_RV[row], limits)
    ids_K = keep_V.nonzero()[:, 0]
    weights_K = block.weights_RV[row].index_select(0, ids_K)
    scores_K = weights_K / exponential_noise([key], ids_K[None])[0]
    token_id = int(ids_K[scores_K.argmax()])
    kept_units = int(block.units_RV[row].index_select(0, ids_K).sum())
    return _result(block, row, token_id, kept_units)


def _kept_by_buckets(tempered_V: Tensor, units_V: Tensor, limits: _Limits) -> Tensor:
    """Return which tokens of a row are kept, bool [V]; only one bucket has to be sorted.

    Buckets are intervals of t, so that all tokens of a lower bucket rank before those of a higher.
    """
    bucket_V = (tempered_V * -_BUCKETS_PER_NAT).clamp_(max=_NUM_BUCKETS - 1).to(torch.int64)
    units_B = torch.zeros(_NUM_BUCKETS, dtype=torch.int64, device=units_V.device)
    units_B.scatter_add_(0, bucket_V, units_V)
    count_B = torch.bincount(bucket_V, minlength=_NUM_BUCKETS)
    reached_B = (units_B.cumsum(0) >= limits.units) | (count_B.cumsum(0) >= limits.rank)
    end_buckets = reached_B.nonzero()
    last = int(end_buckets[0]) if len(end_buckets) else _NUM_BUCKETS
    keep_V = bucket_V < last
    if last < _NUM_BUCKETS:
        ids_K = (bucket_V == last).nonzero()[:, 0]
        order_K = torch.sort(tempered_V[ids_K], descending=True, stable=True).indices
        ranked_K = units_V[ids_K[order_K]]
        before_K = units_B[:last].sum() + ranked_K.cumsum(0) - ranked_K
        rank_K = count_B[:last].sum() + torch.arange(len(ids_K), device=ids_K.device)
        keep_V[ids_K[order_K]] = (before_K < limits.units) & (rank_K < limits.rank)
    return keep_V & (tempered_V >= limits.tempered) & (tempered_V > -math.inf)


def _result(block: _Block, row: int, token_id: int, kept_units: int) -> Draw:
    log_kept = math.log(kept_units / 2**_UNIT_BITS)
    logprob = float(block.tempered_RV[row, token_id]) - log_kept
    return Draw(token_id, min(0.0, logprob), kept_units / block.totals[row])


def _rows(values_RV: Tensor, rows: list[int]) -> Tensor:
    return values_RV if len(rows) == values_RV.shape[0] else values_RV[rows]


def _mix(hashed: int) -> int:
    hashed ^= hashed >> 16
    hashed = hashed * _MULTIPLIER_1 & _MASK_32
    hashed ^= hashed >> 15
    hashed = hashed * _MULTIPLIER_2 & _MASK_32
    return hashed ^ hashed >> 15


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word

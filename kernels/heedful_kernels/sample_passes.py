"""The later passes of sample.py: rows whose kept prefix does not end within the candidates.

Owns the histogram of t that brackets the end, the exact walk up to the bracket and the last resort.
Every kernel returns at once for rows that do not need it, so that a batch needs no decision on the
host. Names are those of sample_kernels.py.
"""

from __future__ import annotations

from heedful_kernels.launch import jit, tl
from heedful_kernels.sample_kernels import exponential_noise, left_out, load_keys, to_units


@jit
def _tempered(  # type: ignore[no-untyped-def]
    logits, edited, allowed, row, v, ok, m, temp, logits_stride, W,
    EDITS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """t of a tile's tokens, -inf for those that are left out or listed as edits."""
    x = tl.load(logits + row * logits_stride + v, mask=ok, other=float("-inf")).to(tl.float32)
    x = tl.where(left_out(edited, allowed, row, v, ok, W, EDITS, MASK), float("-inf"), x)
    return tl.where(x == float("-inf"), x, tl.div_rn(x - m, temp))


@jit
def _bucket(t, BUCKETS: tl.constexpr):  # type: ignore[no-untyped-def]
    # Buckets are 1/128 wide; the last takes everything below.
    return tl.minimum(tl.maximum(t, -65536.0) * -128.0, BUCKETS - 1.0).to(tl.int32)


@jit
def histogram_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, edited, allowed, found_ids, found_values, flags, rows_m, histogram,
    logits_stride, V, W, E, per_split, segment, row_found,
    EDITS: tl.constexpr, MASK: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second pass, first walk: how many tokens lie in each bucket of t."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(flags + row) == 1:
        temp = tl.maximum(tl.load(temperature + row), 1e-30)
        m = tl.load(rows_m + row)
        counts = tl.zeros([BUCKETS], tl.int32)
        if EDITS and split == 0:
            e = tl.arange(0, BLOCK_E)
            place = row * row_found + segment + e
            i = tl.load(found_ids + place, mask=e < E, other=-1)
            x = tl.load(found_values + place, mask=e < E, other=float("-inf"))
            ok = (i >= 0) & (x > float("-inf"))
            t = tl.div_rn(tl.where(ok, x - m, 0.0), temp)
            counts += tl.histogram(_bucket(t, BUCKETS), BUCKETS, mask=ok)
        first = split * per_split
        last = tl.minimum(first + per_split, V)
        for v0 in range(first, last, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            t = _tempered(logits, edited, allowed, row, v, v < last, m, temp, logits_stride, W,
                          EDITS, MASK)  # fmt: skip
            counts += tl.histogram(_bucket(t, BUCKETS), BUCKETS, mask=t > float("-inf"))
        bucket = tl.arange(0, BUCKETS)
        tl.store(histogram + (row * tl.num_programs(0) + split) * BUCKETS + bucket, counts)


@jit
def bracket_kernel(  # type: ignore[no-untyped-def]
    top_k, top_p, flags, rows_total, histogram, brackets, num_splits, BUCKETS: tl.constexpr
):
    """The buckets in which the kept prefix may end, from bounds on each bucket's mass."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags + row) == 1:
        bucket = tl.arange(0, BUCKETS)
        counts = tl.zeros([BUCKETS], tl.int32)
        for split in range(num_splits):
            counts += tl.load(histogram + (row * num_splits + split) * BUCKETS + bucket)
        upper = counts.to(tl.float32) * tl.exp(bucket.to(tl.float32) * -0.0078125)
        most = tl.cumsum(upper, 0)
        ranks = tl.cumsum(counts, 0)
        p, k = tl.load(top_p + row), tl.load(top_k + row)
        limit = (p * (tl.load(rows_total + row) / 17592186044416.0)).to(tl.float32)
        limit = tl.where(p < 1.0, limit, float("inf"))
        rank = tl.where(k > 0, k, 2147483647)
        # Sums of thousands of fp32 numbers are good to a few millionths; a bucket's lower bound is
        # exp(-1/128) of its upper one, which the last bucket does not have.
        may_end = (most * 1.0001 >= limit) | (ranks >= rank)
        least = tl.where(bucket < BUCKETS - 1, most * 0.9920, 0.0)
        must_end = (least >= limit) | (ranks >= rank)
        begin = tl.min(tl.where(may_end, bucket, BUCKETS), 0)
        end = tl.min(tl.where(must_end, bucket, BUCKETS - 1), 0)
        # Without a limit nothing ends: every token ranks before the bracket.
        endless = (p >= 1.0) & (k <= 0)
        tl.store(brackets + 2 * row, tl.where(endless, BUCKETS, tl.minimum(begin, BUCKETS - 1)))
        tl.store(brackets + 2 * row + 1, end)


@jit
def collect_kernel(  # type: ignore[no-untyped-def]
    logits, keys, temperature, log_min_p, edited, allowed, flags, rows_m, brackets,
    marks, found_ids, found_values,
    certain_units, certain_kept, certain_counts, certain_scores, certain_ids,
    logits_stride, V, W, per_split, row_found,
    EDITS: tl.constexpr, MASK: tl.constexpr, CAPACITY: tl.constexpr, MARKS: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second pass, second walk: exact sums and race before the bracket, candidates within it."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(flags + row) == 1:
        temp = tl.maximum(tl.load(temperature + row), 1e-30)
        m, floor = tl.load(rows_m + row), tl.load(log_min_p + row)
        begin, end = tl.load(brackets + 2 * row), tl.load(brackets + 2 * row + 1)
        key0, key1 = load_keys(keys, row)
        units, kept_units = tl.zeros([1], tl.int64), tl.zeros([1], tl.int64)
        count, num_found = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
        score = tl.full([1], -1.0, tl.float32)
        best_id = tl.full([1], 2147483647, tl.int32)
        segment = row * row_found + split * CAPACITY
        first = split * per_split
        last = tl.minimum(first + per_split, V)
        for v0 in range(first, last, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            t = _tempered(logits, edited, allowed, row, v, v < last, m, temp, logits_stride, W,
                          EDITS, MASK)  # fmt: skip
            bucket = _bucket(t, BUCKETS)
            there = t > float("-inf")
            certain = there & (bucket < begin)
            units += tl.sum(tl.where(certain, to_units(t), 0), 0)
            count += tl.sum(certain.to(tl.int32), 0)
            kept = certain & (t >= floor)
            kept_units += tl.sum(tl.where(kept, to_units(t), 0), 0)
            race = tl.where(kept, tl.div_rn(tl.exp(t), exponential_noise(v, key0, key1)), -1.0)
            tile_score = tl.max(race, 0)
            tile_id = tl.min(tl.where(kept & (race == tile_score), v, 2147483647), 0)
            best_id = tl.where(tile_score > score, tile_id, best_id)
            score = tl.maximum(score, tile_score)
            within = there & (bucket >= begin) & (bucket <= end)
            place = num_found + tl.cumsum(within.to(tl.int32), 0) - 1
            fits = within & (place < CAPACITY)
            x = tl.load(logits + row * logits_stride + v, mask=fits, other=0.0).to(tl.float32)
            tl.store(found_ids + segment + place, v, mask=fits)
            tl.store(found_values + segment + place, x, mask=fits)
            num_found += tl.sum(within.to(tl.int32), 0)
        at = row * tl.num_programs(0) + split + tl.arange(0, 1)
        tl.store(certain_units + at, units)
        tl.store(certain_kept + at, kept_units)
        tl.store(certain_counts + at, count)
        tl.store(certain_scores + at, score)
        tl.store(certain_ids + at, best_id)
        tl.store(marks + at * MARKS + 2, num_found)


@jit
def _row_sums(  # type: ignore[no-untyped-def]
    logits, edited, allowed, edit_t, edit_id, row, m, temp, key, last_id, logits_stride, V, W,
    EDITS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Units and number of tokens above a key; number of those at it with ids up to last_id."""
    edit_key = -(tl.abs(edit_t).to(tl.int32, bitcast=True))
    edit_there = edit_t > float("-inf")
    edit_above = edit_there & (edit_key > key)
    units = tl.sum(tl.where(edit_above, to_units(edit_t), 0), 0)
    count = tl.sum(edit_above.to(tl.int32), 0)
    tied = tl.sum((edit_there & (edit_key == key) & (edit_id <= last_id)).to(tl.int32), 0)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        t = _tempered(logits, edited, allowed, row, v, v < V, m, temp, logits_stride, W,
                      EDITS, MASK)  # fmt: skip
        there = t > float("-inf")
        t_key = -(tl.abs(t).to(tl.int32, bitcast=True))
        above = there & (t_key > key)
        units += tl.sum(tl.where(above, to_units(t), 0), 0)
        count += tl.sum(above.to(tl.int32), 0)
        tied += tl.sum((there & (t_key == key) & (v <= last_id)).to(tl.int32), 0)
    return units, count, tied


@jit
def last_kernel(  # type: ignore[no-untyped-def]
    logits, keys, temperature, top_k, top_p, log_min_p, edited, allowed,
    found_ids, found_values, flags, rows_m, rows_total,
    tokens, logprobs, sampling_logprobs, kept_masses, statuses, passes,
    logits_stride, V, W, E, segment, row_found,
    EDITS: tl.constexpr, MASK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last resort, for thousands of tokens of nearly equal t where the prefix ends: halving the
    range of t and of ids, with a walk over the row each time.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags + row) == 2:
        temp = tl.maximum(tl.load(temperature + row), 1e-30)
        m, floor = tl.load(rows_m + row), tl.load(log_min_p + row)
        total_units = tl.load(rows_total + row)
        p, k = tl.load(top_p + row), tl.load(top_k + row)
        limit = tl.ceil(p * total_units).to(tl.int64)
        limit = tl.where(p < 1.0, limit, 4611686018427387904)
        rank = tl.where(k > 0, k, 2147483647)
        key0, key1 = load_keys(keys, row)
        e = tl.arange(0, BLOCK_E)
        place = row * row_found + segment + e
        edit_id = tl.load(found_ids + place, mask=e < E, other=-1)
        edit_x = tl.load(found_values + place, mask=e < E, other=float("-inf"))
        edit_x = tl.where(edit_id >= 0, edit_x, float("-inf"))
        edit_t = tl.where(edit_x == float("-inf"), edit_x, tl.div_rn(edit_x - m, temp))
        low = tl.full([], -2139095041, tl.int32)
        high = tl.full([], 0, tl.int32)
        everyone = tl.full([], 262144, tl.int32)
        for _ in range(32):
            middle = low + (high - low) // 2
            units, count, _tied = _row_sums(
                logits, edited, allowed, edit_t, edit_id, row, m, temp, middle, everyone,
                logits_stride, V, W, EDITS, MASK, BLOCK,
            )  # fmt: skip
            holds = (units < limit) & (count < rank)
            high = tl.where(holds, middle, high)
            low = tl.where(holds, low, tl.minimum(middle + 1, high))
        key = high
        units, count, _tied = _row_sums(
            logits, edited, allowed, edit_t, edit_id, row, m, temp, key, everyone,
            logits_stride, V, W, EDITS, MASK, BLOCK,
        )  # fmt: skip
        unit = to_units(-((-key).to(tl.float32, bitcast=True)))
        room = tl.where(unit > 0, (limit - units + unit - 1) // tl.maximum(unit, 1), rank)
        room = tl.minimum(room, (rank - count).to(tl.int64))
        low = tl.full([], -1, tl.int32)
        high = tl.full([], 262144, tl.int32)
        for _ in range(19):
            middle = low + (high - low) // 2
            _units_above, _count, tied = _row_sums(
                logits, edited, allowed, edit_t, edit_id, row, m, temp, key, middle,
                logits_stride, V, W, EDITS, MASK, BLOCK,
            )  # fmt: skip
            enough = tied.to(tl.int64) >= room
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, tl.minimum(middle + 1, high))
        edit_key = -(tl.abs(edit_t).to(tl.int32, bitcast=True))
        edit_kept = (edit_key > key) | ((edit_key == key) & (edit_id <= high))
        edit_kept &= (edit_t > float("-inf")) & (edit_t >= floor)
        kept_units = tl.sum(tl.where(edit_kept, to_units(edit_t), 0), 0)
        edit_race = tl.div_rn(tl.exp(edit_t), exponential_noise(edit_id, key0, key1))
        edit_race = tl.where(edit_kept, edit_race, -1.0)
        score = tl.max(edit_race, 0)
        token = tl.min(tl.where(edit_kept & (edit_race == score), edit_id, 2147483647), 0)
        t_token = tl.max(tl.where(edit_kept & (edit_id == token), edit_t, float("-inf")), 0)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            t = _tempered(logits, edited, allowed, row, v, v < V, m, temp, logits_stride, W,
                          EDITS, MASK)  # fmt: skip
            t_key = -(tl.abs(t).to(tl.int32, bitcast=True))
            kept = (t_key > key) | ((t_key == key) & (v <= high))
            kept &= (t > float("-inf")) & (t >= floor)
            kept_units += tl.sum(tl.where(kept, to_units(t), 0), 0)
            race = tl.div_rn(tl.exp(t), exponential_noise(v, key0, key1))
            race = tl.where(kept, race, -1.0)
            tile_score = tl.max(race, 0)
            tile_id = tl.min(tl.where(kept & (race == tile_score), v, 2147483647), 0)
            tile_t = tl.max(tl.where(kept & (v == tile_id), t, float("-inf")), 0)
            wins = (tile_score > score) | ((tile_score == score) & (tile_id < token))
            token = tl.where(wins, tile_id, token)
            t_token = tl.where(wins, tile_t, t_token)
            score = tl.maximum(score, tile_score)
        raw = tl.load(logits + row * logits_stride + token).to(tl.float32)
        mass = kept_units.to(tl.float64)
        log_kept = tl.log((mass / 17592186044416.0).to(tl.float32))
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, tl.minimum(raw - tl.load(logprobs + row), 0.0))
        tl.store(sampling_logprobs + row, tl.minimum(t_token - log_kept, 0.0))
        share = (mass / total_units).to(tl.float32)
        tl.store(kept_masses + row, tl.minimum(share, 1.0))
        tl.store(statuses + row, 0)
        tl.store(passes + row, 3)

"""The Triton kernels of sample.py, in the order in which they run. See there for what and why.

Owns the device side only: hash and noise (those of sample_reference.py), the walk over a row, and
the decision where a kept prefix ends. Every kernel that belongs to a later pass returns at once for
rows that do not need it, so that a batch needs no decision on the host.

Values of a row, as [R, ...] in one record of tensors: `stats` fp32 and `marks` int32 per split of
the row, `found` the candidates' ids and logits per split, with the edited tokens as a last segment.
"""

from __future__ import annotations

from heedful_kernels.launch import jit, tl

# Slots of one split's record in `stats` and `marks`.
STATS = 5  # raw maximum, raw sum, maximum, sum, best score
MARKS = 3  # id of the maximum, id of the best score, number of candidates


@jit
def exponential_noise(ids, key0, key1):  # type: ignore[no-untyped-def]
    """E ~ Exp(1) of token ids under a row's two keys, as sample_reference defines it."""
    h = ids.to(tl.uint32) * 0x9E3779B9 + key0
    h ^= h >> 16
    h *= 0x21F0AAAD
    h += key1
    h ^= h >> 15
    h *= 0xD35A2D97
    h ^= h >> 15
    u = ((h & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    u = tl.minimum(u, 0.99999994039535522)  # 1 - 2^-24
    # -log1p(-u) = -log(z), z = 1 - u. A fast logarithm is only absolutely accurate near 1, where
    # the smallest and most decisive values lie: z = mantissa * 2^-e with 1 - mantissa = v <= 1/2
    # known exactly, and -log(1 - v) = 2 artanh(v / (2 - v)).
    z = 1.0 - u
    bits = z.to(tl.int32, bitcast=True)
    exponent = tl.where(u < 0.5, 0, 126 - (bits >> 23))
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    v = tl.where(u < 0.5, u, 1.0 - mantissa)
    s = tl.div_rn(v, 2.0 - v)
    q = s * s
    series = 0.0769230769 + q * (0.0666666667 + q * 0.0588235294)
    series = 0.2 + q * (0.142857143 + q * (0.111111111 + q * (0.0909090909 + q * series)))
    return 2.0 * s * (1.0 + q * (0.333333333 + q * series)) + exponent.to(tl.float32) * 0.693147181


@jit
def to_units(t):  # type: ignore[no-untyped-def]
    """exp(t) in 2^-44ths, whose sums do not depend on their order."""
    return (tl.exp(t) * 17592186044416.0).to(tl.int64)  # 2^44


@jit
def load_keys(keys, row):  # type: ignore[no-untyped-def]
    """A row's two keys as unsigned numbers."""
    key0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    key1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    return key0, key1


@jit
def edit_kernel(  # type: ignore[no-untyped-def]
    logits, ids, bias, counts, seen, repetition, presence, frequency, allowed,
    found_ids, found_values, edited, logits_stride, V, W, E, segment, row_found,
    MASK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Edited logits of the listed tokens, into the last segment; their bits in `edited`."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    i = tl.load(ids + row * E + e, mask=e < E, other=-1)
    ok = (i >= 0) & (i < V)
    x = tl.load(logits + row * logits_stride + i, mask=ok, other=0.0).to(tl.float32)
    x += tl.load(bias + row * E + e, mask=ok, other=0.0)
    penalty = tl.load(repetition + row)
    wide = x.to(tl.float64)
    wide = tl.where(wide > 0.0, wide / penalty, wide * penalty)
    penalized = tl.minimum(wide, 1e30).to(tl.float32)
    occurs = tl.load(seen + row * E + e, mask=ok, other=0) != 0
    x = tl.where(occurs & (e * 0 + penalty != 1.0), penalized, x)
    count = tl.load(counts + row * E + e, mask=ok, other=0)
    cost = tl.load(presence + row) + tl.load(frequency + row) * count.to(tl.float64)
    x = tl.where(count > 0, x - cost.to(tl.float32), x)
    bit = (i.to(tl.uint32) & 31).to(tl.int32)
    if MASK:
        word = tl.load(allowed + row * W + i // 32, mask=ok, other=0)
        x = tl.where(((word >> bit) & 1) != 0, x, float("-inf"))
    tl.atomic_or(edited + row * W + i // 32, tl.full([BLOCK_E], 1, tl.int32) << bit, mask=ok)
    place = row * row_found + segment + e
    tl.store(found_ids + place, tl.where(ok, i, -1), mask=e < E)
    tl.store(found_values + place, x, mask=e < E)


@jit
def left_out(edited, allowed, row, v, ok, W, EDITS: tl.constexpr, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tokens of a tile a walk passes over: masked ones, and edited ones, listed elsewhere."""
    skip = ~ok
    if EDITS:
        word = tl.load(edited + row * W + v // 32, mask=ok, other=0)
        skip |= ((word >> (v % 32)) & 1) != 0
    if MASK:
        word = tl.load(allowed + row * W + v // 32, mask=ok, other=0)
        skip |= ((word >> (v % 32)) & 1) == 0
    return skip


@jit
def scan_kernel(  # type: ignore[no-untyped-def]
    logits, keys, temperature, top_k, top_p, log_min_p, edited, allowed,
    stats, marks, found_ids, found_values,
    logits_stride, V, W, per_split, row_found, depth,
    EDITS: tl.constexpr, MASK: tl.constexpr, CAPACITY: tl.constexpr,
    STATS: tl.constexpr, MARKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one read: maxima and sums, the race of untruncated rows, candidates of truncated ones."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temp = tl.load(temperature + row)
    draws = temp > 0.0
    temp = tl.maximum(temp, 1e-30)
    floor = tl.load(log_min_p + row)
    truncates = draws & (
        (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0) | (floor > float("-inf"))
    )
    reach = temp * tl.where(floor > float("-inf"), -floor, depth)
    key0, key1 = load_keys(keys, row)
    raw_m, raw_s = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    m, s = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    score = tl.full([1], -1.0, tl.float32)
    top_id, best_id = tl.full([1], -1, tl.int32), tl.full([1], -1, tl.int32)
    num_found = tl.zeros([1], tl.int32)
    segment = row * row_found + split * CAPACITY
    first = split * per_split
    last = tl.minimum(first + per_split, V)
    for v0 in range(first, last, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        ok = v < last
        x = tl.load(logits + row * logits_stride + v, mask=ok, other=float("-inf"))
        x = x.to(tl.float32)
        # A NaN passes by every maximum but not by the sum.
        new_m = tl.maximum(raw_m, tl.max(x, 0))
        anchor = tl.where(new_m == float("-inf"), 0.0, new_m)
        raw_s = raw_s * tl.exp(raw_m - anchor) + tl.sum(tl.exp(x - anchor), 0)
        raw_m = new_m
        skip = left_out(edited, allowed, row, v, ok, W, EDITS, MASK)
        x = tl.where(skip, float("-inf"), x)
        tile_m = tl.max(x, 0)
        tile_id = tl.min(tl.where(x == tile_m, v, 2147483647), 0)
        top_id = tl.where(tile_m > m, tile_id, top_id)
        new_m = tl.maximum(m, tile_m)
        anchor = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp(tl.div_rn(m - anchor, temp))
        p = tl.exp(tl.div_rn(x - anchor, temp))
        p = tl.where(x == float("-inf"), 0.0, p)
        s = s * decay + tl.sum(p, 0)
        m = new_m
        if draws:
            if truncates:
                keep = (x >= m - reach) & (x > float("-inf"))
                place = num_found + tl.cumsum(keep.to(tl.int32), 0) - 1
                fits = keep & (place < CAPACITY)
                tl.store(found_ids + segment + place, v, mask=fits)
                tl.store(found_values + segment + place, x, mask=fits)
                num_found += tl.sum(keep.to(tl.int32), 0)
            else:
                race = tl.div_rn(p, exponential_noise(v, key0, key1))
                race = tl.where(x > float("-inf"), race, -1.0)
                tile_score = tl.max(race, 0)
                tile_id = tl.min(tl.where(race == tile_score, v, 2147483647), 0)
                score = tl.where(score > 0.0, score * decay, score)
                best_id = tl.where(tile_score > score, tile_id, best_id)
                score = tl.maximum(score, tile_score)
    one = tl.arange(0, 1)
    record = stats + (row * tl.num_programs(0) + split) * STATS + one
    tl.store(record, raw_m)
    tl.store(record + 1, raw_s)
    tl.store(record + 2, m)
    tl.store(record + 3, s)
    tl.store(record + 4, score)
    record = marks + (row * tl.num_programs(0) + split) * MARKS + one
    tl.store(record, top_id)
    tl.store(record + 1, best_id)
    tl.store(record + 2, num_found)


@jit
def _end_of_prefix(  # type: ignore[no-untyped-def]
    t, ids, valid, before_units, before_count, limit, rank,
):  # fmt: skip
    """Which candidates are kept: the shortest prefix of the ranking that reaches either limit.

    A token is kept while the units ranked before it are below limit and its rank is below rank;
    before_units and before_count belong to tokens that rank before all candidates. The ranking is
    by t, so the end is found by halving the range of t's bits, then that of ids among equal t.
    """
    key = -(tl.abs(t).to(tl.int32, bitcast=True))  # ascending with t <= 0
    units = tl.where(valid, to_units(t), 0)
    low = tl.full([1], -2139095041, tl.int32)  # below the key of -inf
    high = tl.zeros([1], tl.int32)
    for _ in range(32):
        middle = low + (high - low) // 2
        above = valid & (key > middle)
        mass = before_units + tl.sum(tl.where(above, units, 0), 0)
        count = before_count + tl.sum(above.to(tl.int32), 0)
        holds = (mass < limit) & (count < rank)
        high = tl.where(holds, middle, high)
        low = tl.where(holds, low, tl.minimum(middle + 1, high))
    above = valid & (key > high)
    tied = valid & (key == high)
    mass = before_units + tl.sum(tl.where(above, units, 0), 0)
    count = before_count + tl.sum(above.to(tl.int32), 0)
    unit = tl.max(tl.where(tied, units, 0), 0)
    room = tl.where(unit > 0, (limit - mass + unit - 1) // tl.maximum(unit, 1), rank.to(tl.int64))
    room = tl.minimum(room, (rank - count).to(tl.int64))
    low = tl.full([1], -1, tl.int32)
    high = tl.full([1], 262144, tl.int32)  # beyond every id
    for _ in range(19):
        middle = low + (high - low) // 2
        enough = tl.sum((tied & (ids <= middle)).to(tl.int64), 0) >= room
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, tl.minimum(middle + 1, high))
    return above | (tied & (ids <= high))


@jit
def decide_kernel(  # type: ignore[no-untyped-def]
    logits, keys, temperature, top_k, top_p, log_min_p,
    stats, marks, found_ids, found_values, flags, rows_m, rows_total,
    certain_units, certain_kept, certain_counts, certain_scores, certain_ids,
    tokens, logprobs, sampling_logprobs, kept_masses, statuses, passes,
    logits_stride, V, E, segment, row_found, depth, num_splits,
    SECOND: tl.constexpr, CAPACITY: tl.constexpr, STATS: tl.constexpr, MARKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Token and by-products of a row from its candidates; flags rows that need another pass."""
    row = tl.program_id(0).to(tl.int64)
    if (not SECOND) or (tl.load(flags + row) == 1):
        temp = tl.load(temperature + row)
        draws = temp > 0.0
        temp = tl.maximum(temp, 1e-30)
        k, p_limit = tl.load(top_k + row), tl.load(top_p + row)
        floor = tl.load(log_min_p + row)
        truncates = draws & ((k > 0) | (p_limit < 1.0) | (floor > float("-inf")))
        key0, key1 = load_keys(keys, row)
        split = tl.arange(0, SPLITS)
        split_ok = split < num_splits
        record = stats + (row * num_splits + split) * STATS
        raw_m = tl.load(record, mask=split_ok, other=float("-inf"))
        raw_s = tl.load(record + 1, mask=split_ok, other=0.0)
        m_split = tl.load(record + 2, mask=split_ok, other=float("-inf"))
        s_split = tl.load(record + 3, mask=split_ok, other=0.0)
        score = tl.load(record + 4, mask=split_ok, other=-1.0)
        record = marks + (row * num_splits + split) * MARKS
        top_ids = tl.load(record, mask=split_ok, other=-1)
        best_ids = tl.load(record + 1, mask=split_ok, other=-1)
        num_found = tl.load(record + 2, mask=split_ok, other=0)

        best_raw = tl.max(raw_m, 0)
        raw_total = tl.sum(tl.where(raw_s == 0.0, 0.0, raw_s * tl.exp(raw_m - best_raw)), 0)
        lse = best_raw + tl.log(raw_total)
        e = tl.arange(0, BLOCK_E)
        place = row * row_found + segment + e
        edit_id = tl.load(found_ids + place, mask=e < E, other=-1)
        edit_x = tl.load(found_values + place, mask=e < E, other=float("-inf"))
        edit_x = tl.where(edit_id >= 0, edit_x, float("-inf"))
        m = tl.maximum(tl.max(m_split, 0), tl.max(edit_x, 0))

        finite = (tl.abs(best_raw) < float("inf")) & (raw_total == raw_total)
        # An edit may add +inf or NaN; a sum of edited values tells.
        sane = (m < float("inf")) & (tl.sum(tl.where(edit_x == edit_x, 0.0, 1.0), 0) == 0.0)
        if (not finite) | (not sane) | (m == float("-inf")):
            tl.store(statuses + row, tl.where(finite & sane, 2, 1))
            tl.store(tokens + row, tl.full([], -1, tl.int64))
            tl.store(logprobs + row, float("nan"))
            tl.store(sampling_logprobs + row, float("nan"))
            tl.store(kept_masses + row, float("nan"))
            tl.store(flags + row, 0)
            tl.store(passes + row, 1)
        else:
            decay = tl.exp(tl.div_rn(m_split - m, temp))
            decay = tl.where(m_split == float("-inf"), 0.0, decay)
            edit_t = tl.div_rn(edit_x - m, temp)
            edit_t = tl.where(edit_x == float("-inf"), float("-inf"), edit_t)
            edit_p = tl.exp(edit_t)
            total = tl.sum(s_split * decay, 0) + tl.sum(edit_p, 0)
            if not truncates:
                if draws:
                    plain_race = tl.where(score >= 0.0, score * decay, -1.0)
                    edit_race = tl.div_rn(edit_p, exponential_noise(edit_id, key0, key1))
                    edit_race = tl.where(edit_x > float("-inf"), edit_race, -1.0)
                    plain_ids = best_ids
                else:
                    plain_race, edit_race, plain_ids = m_split, edit_x, top_ids
                plain_best = tl.maximum(tl.max(plain_race, 0), tl.max(edit_race, 0))
                plain_token = tl.minimum(
                    tl.min(
                        tl.where(
                            (plain_race == plain_best) & (plain_ids >= 0), plain_ids, 2147483647
                        ),
                        0,
                    ),
                    tl.min(
                        tl.where((edit_race == plain_best) & (edit_id >= 0), edit_id, 2147483647), 0
                    ),
                )
                plain_raw = tl.load(logits + row * logits_stride + plain_token).to(tl.float32)
                edited_x = tl.max(tl.where(edit_id == plain_token, edit_x, float("-inf")), 0)
                is_edit = tl.sum((edit_id == plain_token).to(tl.int32), 0) > 0
                plain_value = tl.where(is_edit, edited_x, plain_raw)
                plain_t = tl.div_rn(plain_value - m, temp)
                drawn = tl.minimum(plain_t - tl.log(total), 0.0)
                tl.store(tokens + row, plain_token.to(tl.int64))
                tl.store(logprobs + row, tl.minimum(plain_raw - lse, 0.0))
                tl.store(sampling_logprobs + row, tl.where(draws, drawn, 0.0))
                tl.store(kept_masses + row, 1.0)
                tl.store(statuses + row, 0)
                tl.store(flags + row, 0)
                tl.store(passes + row, 1)
            else:
                lane = tl.arange(0, LANES)
                owner = lane // CAPACITY
                in_splits = owner < num_splits
                held = tl.load(marks + (row * num_splits + owner) * MARKS + 2,
                               mask=in_splits, other=0)  # fmt: skip
                there = (in_splits & (lane % CAPACITY < held)) | (
                    (lane >= segment) & (lane < segment + E)
                )
                lane_place = row * row_found + lane
                ids = tl.load(found_ids + lane_place, mask=there, other=-1)
                x = tl.load(found_values + lane_place, mask=there, other=float("-inf"))
                valid = there & (ids >= 0) & (x > float("-inf"))
                x = tl.where(valid, x, m)
                t = tl.div_rn(x - m, temp)
                overflows = tl.max(num_found, 0) > CAPACITY
                total_units = total.to(tl.float64) * 17592186044416.0
                limit = tl.ceil(p_limit * total_units).to(tl.int64)
                limit = tl.where(p_limit < 1.0, limit, 4611686018427387904)
                rank = tl.where(k > 0, k, 2147483647)
                before_units = tl.full([], 0, tl.int64)
                kept_before = tl.full([], 0, tl.int64)
                before_count = tl.full([], 0, tl.int32)
                best = tl.full([], -1.0, tl.float32)
                token = tl.full([], 2147483647, tl.int32)
                if SECOND:
                    # Edited tokens of buckets that are certainly kept count as candidates: they
                    # rank before the bracket, and so does whatever ranks before them.
                    at = row * num_splits + split
                    before_units += tl.sum(tl.load(certain_units + at, mask=split_ok, other=0), 0)
                    kept_before += tl.sum(tl.load(certain_kept + at, mask=split_ok, other=0), 0)
                    before_count += tl.sum(tl.load(certain_counts + at, mask=split_ok, other=0), 0)
                    scores = tl.load(certain_scores + at, mask=split_ok, other=-1.0)
                    best = tl.max(scores, 0)
                    race_ids = tl.load(certain_ids + at, mask=split_ok, other=2147483647)
                    token = tl.min(tl.where(scores == best, race_ids, 2147483647), 0)
                    complete = ~overflows
                else:
                    reach = temp * tl.where(floor > float("-inf"), -floor, depth)
                    valid &= x >= m - reach
                    mass = tl.sum(tl.where(valid, to_units(t), 0), 0)
                    count = tl.sum(valid.to(tl.int32), 0)
                    enough = (mass >= limit) | (count >= rank) | (floor > float("-inf"))
                    complete = enough & ~overflows
                if complete:
                    kept = _end_of_prefix(t, ids, valid, before_units, before_count, limit, rank)
                    kept &= t >= floor
                    race = tl.div_rn(tl.exp(t), exponential_noise(ids, key0, key1))
                    race = tl.where(kept, race, -1.0)
                    lane_best = tl.max(race, 0)
                    lane_token = tl.min(tl.where(kept & (race == lane_best), ids, 2147483647), 0)
                    wins = (lane_best > best) | ((lane_best == best) & (lane_token < token))
                    token = tl.where(wins, lane_token, token)
                    kept_units = kept_before + tl.sum(tl.where(kept, to_units(t), 0), 0)
                    raw = tl.load(logits + row * logits_stride + token).to(tl.float32)
                    lane_t = tl.max(tl.where(valid & (ids == token), t, float("-inf")), 0)
                    t_token = tl.where(wins, lane_t, tl.div_rn(raw - m, temp))
                    kept_wide = kept_units.to(tl.float64)
                    log_kept = tl.log((kept_wide / 17592186044416.0).to(tl.float32))
                    tl.store(tokens + row, token.to(tl.int64))
                    tl.store(logprobs + row, tl.minimum(raw - lse, 0.0))
                    tl.store(sampling_logprobs + row, tl.minimum(t_token - log_kept, 0.0))
                    share = (kept_wide / total_units).to(tl.float32)
                    tl.store(kept_masses + row, tl.minimum(share, 1.0))
                    tl.store(statuses + row, 0)
                    tl.store(passes + row, 2 if SECOND else 1)
                    tl.store(flags + row, 0)
                else:
                    tl.store(flags + row, 2 if SECOND else 1)
                    tl.store(rows_m + row, m)
                    tl.store(rows_total + row, total_units)
                    # The last pass fills in the rest.
                    tl.store(logprobs + row, lse)

// Low-rank adapters, many in one batch: h = A_s x, then y += scale_s * B_s h. Rows of one slot share
// loads; each row's sums run in one order whatever the group.
//
// A slot of A is [segments, tiles, K/2, 16 ranks, 2] and one of B [N/16, tiles * 8, 16 outputs, 2]
// for bf16, where tiles is the slot's rank in sixteenths, rounded up; for fp32 the last two axes are
// swapped. Slots are as far apart as max_rank needs. So one pair of inputs (or ranks) is one load or
// two, neighbours in memory are used one after the other, and no sum runs across lanes.
namespace hk {
namespace {

// Pairs of bf16, a cache line each, by which loads are announced: an adapter is read once per step.
// With few rows the sums wait for memory anyway, and announcing it was measured to cost them.
constexpr int kLoraAhead = 24, kLoraAheadRows = 4;

template <bool kBf16>
inline void load_pair(const void *base, size_t pair, int lane, vf *even, vf *odd) {
  const size_t at = pair * 2 * kRankTile;
  if (kBf16) {
    split_pairs((const uint16_t *)base + at + 2 * lane, even, odd);
  } else {
    *even = load((const float *)base + at + lane);
    *odd = load((const float *)base + at + kRankTile + lane);
  }
}

// sum[r] over pairs of x[r][2i] * even_i + x[r][2i + 1] * odd_i, for 16 neighbouring lanes.
template <bool kBf16, int R>
inline void sum_pairs(const void *base, size_t first_pair, int pairs, const float *const x[R],
                      vf sum[R][kRankTile / W]) {
  for (int v = 0; v < kRankTile / W; ++v) {
    vf even_sum[R], odd_sum[R];
    for (int r = 0; r < R; ++r) even_sum[r] = odd_sum[r] = vf{};
    for (int i = 0; i < pairs; ++i) {
      if (kBf16 && R >= kLoraAheadRows) {
        // Tiles follow each other in memory, so this reaches into the next one.
        __builtin_prefetch((const uint16_t *)base + (first_pair + i + kLoraAhead) * 2 * kRankTile);
      }
      vf even, odd;
      load_pair<kBf16>(base, first_pair + i, v * W, &even, &odd);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        even_sum[r] = fma(splat(x[r][2 * i]), even, even_sum[r]);
        odd_sum[r] = fma(splat(x[r][2 * i + 1]), odd, odd_sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) sum[r][v] = even_sum[r] + odd_sum[r];
  }
}

inline int rank_tiles(int rank) { return (rank + kRankTile - 1) / kRankTile; }

template <bool kBf16, int R>
void shrink_rows(const Call &call, const int32_t *rows, int slot, int segment, int rank) {
  const hk_op &op = *call.op;
  const int k = op.dims[0], max_rank = op.dims[1], segments = op.dims[2];
  const float *x[R];
  for (int r = 0; r < R; ++r) x[r] = (const float *)op.inputs[0] + (size_t)rows[r] * k;
  vf sum[R][kRankTile / W];
  const int tiles = rank_tiles(((const int32_t *)op.inputs[2])[slot]);
  const size_t slot_start = (size_t)slot * segments * (max_rank / kRankTile);
  const size_t tile = slot_start + segment * tiles + rank / kRankTile;
  sum_pairs<kBf16, R>(op.inputs[1], tile * (k / 2), k / 2, x, sum);
  for (int r = 0; r < R; ++r) {
    float *h = (float *)op.outputs[0] + ((size_t)rows[r] * segments + segment) * max_rank + rank;
    for (int v = 0; v < kRankTile / W; ++v) store(h + v * W, sum[r][v]);
  }
}

template <bool kBf16, int R>
void expand_rows(const Call &call, const int32_t *rows, int slot, int column, int column_end) {
  const hk_op &op = *call.op;
  const int n = op.dims[0], max_rank = op.dims[1], segments = op.dims[2];
  const int slot_rank = ((const int32_t *)op.inputs[2])[slot], pairs = (slot_rank + 1) / 2;
  const size_t slot_start = (size_t)slot * (n / kTile) * (max_rank / 2);
  const int tile_pairs = rank_tiles(slot_rank) * kRankTile / 2;
  const vf scale = splat(((const float *)op.inputs[3])[slot]);
  int segment = 0;
  for (; column < column_end; column += kTile) {
    while (column >= op.dims[5 + segment]) ++segment;
    const float *h[R];
    for (int r = 0; r < R; ++r) {
      h[r] = (const float *)op.inputs[0] + ((size_t)rows[r] * segments + segment) * max_rank;
    }
    vf sum[R][kTile / W];
    const size_t first_pair = slot_start + (size_t)(column / kTile) * tile_pairs;
    sum_pairs<kBf16, R>(op.inputs[1], first_pair, pairs, h, sum);
    for (int r = 0; r < R; ++r) {
      float *y = (float *)op.outputs[0] + (size_t)rows[r] * n + column;
      for (int v = 0; v < kTile / W; ++v) store(y + v * W, fma(scale, sum[r][v], load(y + v * W)));
    }
  }
}

using RowsKernel = void (*)(const Call &call, const int32_t *rows, int slot, int first, int second);

#define HK_BY_ROWS(kernel)                                                                      \
  static const RowsKernel by_rows[] = {nullptr, kernel<kBf16, 1>, kernel<kBf16, 2>,             \
                                       kernel<kBf16, kLoraBlock >= 3 ? 3 : 1>,                  \
                                       kernel<kBf16, kLoraBlock >= 4 ? 4 : 1>,                  \
                                       kernel<kBf16, kLoraBlock >= 5 ? 5 : 1>,                  \
                                       kernel<kBf16, kLoraBlock >= 6 ? 6 : 1>,                  \
                                       kernel<kBf16, kLoraBlock >= 7 ? 7 : 1>,                  \
                                       kernel<kBf16, kLoraBlock >= 8 ? 8 : 1>};                 \
  for (int row = 0; row < group.count; row += kLoraBlock) {                                     \
    by_rows[min_int(kLoraBlock, group.count - row)](call, call.lora_order + group.first + row,  \
                                                    group.slot, first, second);                 \
  }

// A unit is one group of rows, one segment and 16 ranks.
template <bool kBf16>
void shrink(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int segments = op.dims[2], tiles = op.dims[1] / kRankTile;
  for (int unit = begin; unit < end; ++unit) {
    const LoraGroup &group = call.lora_groups[unit / (segments * tiles)];
    const int first = unit / tiles % segments, second = unit % tiles * kRankTile;
    if (second >= ((const int32_t *)op.inputs[2])[group.slot]) continue;
    HK_BY_ROWS(shrink_rows)
  }
}

// A unit is one group of rows and a stretch of outputs.
template <bool kBf16>
void expand(const Call &call, int begin, int end) {
  const int n = call.op->dims[0], parts = ceil_div(n, kLoraColumns);
  for (int unit = begin; unit < end; ++unit) {
    const LoraGroup &group = call.lora_groups[unit / parts];
    const int first = unit % parts * kLoraColumns, second = min_int(first + kLoraColumns, n);
    if (((const int32_t *)call.op->inputs[2])[group.slot] <= 0) continue;
    HK_BY_ROWS(expand_rows)
  }
}
#undef HK_BY_ROWS

void lora_shrink(const Call &call, int begin, int end) {
  (call.op->dims[4] ? shrink<true> : shrink<false>)(call, begin, end);
}
void lora_expand(const Call &call, int begin, int end) {
  (call.op->dims[4] ? expand<true> : expand<false>)(call, begin, end);
}

}  // namespace
}  // namespace hk

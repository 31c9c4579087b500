// Integer linears. A unit is one tile of 16 outputs, for all rows of the batch.
//
// y[t, n] = sum over groups g, in order: scale[t, g] * (d[n, g] * dot + m[n, g] * sums[t, g]), where
// dot is the exact integer product of 32 weights and 32 activations. How many rows share a pass over
// the weights changes no row's arithmetic.
namespace hk {
namespace {

using TileProduct = void (*)(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx,
                             const float *scale, const float *sums, ptrdiff_t ldg, float *out);

template <bool kIsQ4>
TileProduct tile_product(int rows) {
#define HK_CASE(m) \
  case m: return kIsQ4 ? q4_tile<m <= kMaxRows ? m : 1> : q8_tile<m <= kMaxRows ? m : 1>;
  switch (rows) {
    HK_CASE(1) HK_CASE(2) HK_CASE(3) HK_CASE(4) HK_CASE(5) HK_CASE(6) HK_CASE(7) HK_CASE(8)
    HK_CASE(9) HK_CASE(10) HK_CASE(11) HK_CASE(12) HK_CASE(13) HK_CASE(14) HK_CASE(15)
    default: return kIsQ4 ? q4_tile<kMaxRows> : q8_tile<kMaxRows>;
  }
#undef HK_CASE
}

inline void write_rows(const float *tile, int rows, int columns, const float *bias, bool accumulate,
                       float *y, size_t ldy) {
  for (int m = 0; m < rows; ++m, y += ldy, tile += kTile) {
    if (columns < kTile) {
      for (int i = 0; i < columns; ++i) {
        float v = bias ? tile[i] + bias[i] : tile[i];
        y[i] = accumulate ? y[i] + v : v;
      }
      continue;
    }
    for (int i = 0; i < kTile; i += W) {
      vf v = load(tile + i);
      if (bias) v += load(bias + i);
      store(y + i, accumulate ? load(y + i) + v : v);
    }
  }
}

template <bool kIsQ4>
void linear(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int n = op.dims[0], k = op.dims[1], groups = k / kGroup, rows = call.rows;
  const int8_t *values = (const int8_t *)op.inputs[0];
  const float *scale = (const float *)op.inputs[1], *sums = (const float *)op.inputs[2];
  const float *bias = (const float *)op.inputs[4];
  const size_t tile_bytes = kIsQ4 ? packed_q4_tile_bytes(groups) : packed_q8_tile_bytes(groups);
  // Blocks of nearly equal height: 17 rows are 9 + 8, not 16 + 1.
  const int blocks = ceil_div(rows, kMaxRows);
  for (int tile = begin; tile < end; ++tile) {
    const uint8_t *w = (const uint8_t *)op.inputs[3] + tile * tile_bytes;
    const int column = tile * kTile, columns = min_int(kTile, n - column);
    float *y = (float *)op.outputs[0] + column;
    for (int block = 0, row = 0; block < blocks; ++block) {
      const int height = (rows - row) / (blocks - block);
      alignas(64) float out[kMaxRows * kTile];
      const size_t group = (size_t)row * groups;
      tile_product<kIsQ4>(height)(w, groups, values + (size_t)row * k, k, scale + group,
                                  sums + group, groups, out);
      write_rows(out, height, columns, bias ? bias + column : nullptr,
                 op.flags & HK_FLAG_ACCUMULATE, y + (size_t)row * n, n);
      row += height;
    }
  }
}

void linear_q4(const Call &call, int begin, int end) { linear<true>(call, begin, end); }
void linear_q8(const Call &call, int begin, int end) { linear<false>(call, begin, end); }

}  // namespace
}  // namespace hk

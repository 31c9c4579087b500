// Paged attention of single query rows over positions 0..their own.
//
// Positions are cut into splits of 256 from position 0. Within a split: all scores, their maximum,
// exp, then a weighted sum of values in order of position. Splits are combined in order. Whether one
// unit is a split or a row's whole context changes who computes what, never the arithmetic.
//
// Query heads that share a key/value head go through K and V together, up to 4 at a time.
namespace hk {
namespace {

constexpr int kStripe = 16;  // positions that lie side by side in the key cache

struct Head {
  const hk_op *op;
  const float *q;          // [heads, D]
  const int32_t *blocks;   // of this row's sequence
  int kv_head, heads, d, padded, block_size, hkv;

  const uint16_t *keys(int position) const {
    const size_t head = (size_t)blocks[position / block_size] * hkv + kv_head;
    return (const uint16_t *)op->inputs[1] + (head * block_size + position % block_size) * d;
  }
  const uint16_t *values(int position) const {
    const size_t head = (size_t)blocks[position / block_size] * hkv + kv_head;
    return (const uint16_t *)op->inputs[2] + (head * block_size + position % block_size) * padded;
  }
};

// The cache is far larger than any CPU cache, and its blocks lie anywhere: without a hint every
// stretch of 2 KiB starts with a wait for memory.
inline void prefetch(const void *p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

// Scores of P stripes of 16 positions for H heads.
template <int H, int P>
void score_stripes(const Head &head, int position, float scale, float (*scores)[kSplit], int at) {
  constexpr int V = kStripe / W;
  const uint16_t *keys[P];
  for (int p = 0; p < P; ++p) keys[p] = head.keys(position + p * kStripe);
  vf sum[H][P * V];
  for (int h = 0; h < H; ++h) {
    for (int i = 0; i < P * V; ++i) sum[h][i] = vf{};
  }
  const int d = head.d;
  for (int i = 0; i < d; i += 2) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        vf even, odd;
        split_pairs(keys[p] + i * kStripe + v * 2 * W, &even, &odd);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          sum[h][p * V + v] = fma(splat(head.q[h * d + i]), even, sum[h][p * V + v]);
          sum[h][p * V + v] = fma(splat(head.q[h * d + i + 1]), odd, sum[h][p * V + v]);
        }
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int i = 0; i < P * V; ++i) store(scores[h] + at + i * W, sum[h][i] * scale);
  }
}

template <int H>
void score_split(const Head &head, int first, int count, float scale, float (*scores)[kSplit]) {
  const int stripes = ceil_div(count, kStripe);
  int s = 0;
  for (; s + kPositionTiles <= stripes; s += kPositionTiles) {
    for (int i = s; i < s + kPositionTiles; ++i) {
      prefetch(head.values(first + i * kStripe), kStripe * head.padded * 2);
    }
    score_stripes<H, kPositionTiles>(head, first + s * kStripe, scale, scores, s * kStripe);
  }
  for (; s < stripes; ++s) {
    prefetch(head.values(first + s * kStripe), kStripe * head.padded * 2);
    score_stripes<H, 1>(head, first + s * kStripe, scale, scores, s * kStripe);
  }
}

// Turns scores into weights relative to their maximum; lanes past the end may hold anything.
inline void weigh(float *scores, int count, float *top, float *total) {
  const vf nothing = splat(-__builtin_inff());
  const vi lane = lanes();
  vf best = nothing;
  for (int i = 0; i < count; i += W) {
    vf s = lane < count - i ? load(scores + i) : nothing;
    store(scores + i, s);
    best = max(s, best);
  }
  const float m = reduce_max(best);
  vf sum = {};
  for (int i = 0; i < count; i += W) {
    vf e = exp(load(scores + i) - m);
    store(scores + i, e);
    sum += e;
  }
  *top = m;
  *total = reduce_add(sum);
}

// Weighted sum of L loads (2 W dimensions each) of the values for H heads.
template <int H, int L>
void sum_values(const Head &head, int first, int count, const float (*weights)[kSplit], int column,
                float *out, int stride) {
  vf even[H][L], odd[H][L];
  for (int h = 0; h < H; ++h) {
    for (int l = 0; l < L; ++l) even[h][l] = odd[h][l] = vf{};
  }
  for (int start = 0; start < count; start += kStripe) {
    const uint16_t *values = head.values(first + start) + column;
    const int n = min_int(kStripe, count - start);
    for (int i = 0; i < n; ++i, values += head.padded) {
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) {
        vf e, o;
        split_pairs(values + l * 2 * W, &e, &o);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          const vf weight = splat(weights[h][start + i]);
          even[h][l] = fma(weight, e, even[h][l]);
          odd[h][l] = fma(weight, o, odd[h][l]);
        }
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int l = 0; l < L; ++l) {
      float *to = out + h * stride + column + l * 2 * W;
      for (int i = 0; i < W; ++i) to[2 * i] = even[h][l][i], to[2 * i + 1] = odd[h][l][i];
    }
  }
}

// H heads over one split: max, sum and unnormalised output, `stride` floats apart from head to head.
template <int H>
void attend(const Head &head, int first, int count, float scale, float *out, int stride) {
  alignas(64) float scores[H][kSplit];
  score_split<H>(head, first, count, scale, scores);
  for (int h = 0; h < H; ++h) {
    weigh(scores[h], count, out + h * stride, out + h * stride + 1);
  }
  int column = 0;
  for (; column + 2 * W * kValueLoads <= head.padded; column += 2 * W * kValueLoads) {
    sum_values<H, kValueLoads>(head, first, count, scores, column, out + 16, stride);
  }
  for (; column < head.padded; column += 2 * W) {
    sum_values<H, 1>(head, first, count, scores, column, out + 16, stride);
  }
}

// All query heads of one key/value head over one split. Partials of neighbouring heads are
// head_stride floats apart.
void attend_split(Head head, int split, int position, float scale, float *out, int head_stride) {
  const int first = split * kSplit, count = min_int(kSplit, position + 1 - first);
  for (int left = head.heads; left > 0;) {
    const int h = min_int(left, kMaxGroupHeads);
    switch (h) {
      case 1: attend<1>(head, first, count, scale, out, head_stride); break;
      case 2: attend<2>(head, first, count, scale, out, head_stride); break;
      case 3: attend<3>(head, first, count, scale, out, head_stride); break;
      default: attend<4>(head, first, count, scale, out, head_stride); break;
    }
    left -= h;
    head.q += h * head.d;
    out += (size_t)h * head_stride;
  }
}

// One head's partials, in order of split, to its final output.
inline void combine(const float *parts, int splits, int stride, int d, float *y) {
  float top = parts[0];
  for (int s = 1; s < splits; ++s) top = parts[s * stride] > top ? parts[s * stride] : top;
  float total = 0.0f;
  float weights[64];
  // Weights are made 64 at a time, once for the sum and again for the outputs beyond 64 splits.
  for (int s = 0; s < splits; ++s) {
    const float w = exp(splat(parts[s * stride] - top))[0];
    if (s < 64) weights[s] = w;
    total += w * parts[s * stride + 1];
  }
  const float inverse = 1.0f / total;
  for (int i = 0; i < d; i += W) {
    vf sum = {};
    for (int s = 0; s < splits; ++s) {
      const vf w = s < 64 ? splat(weights[s]) : exp(splat(parts[s * stride] - top));
      sum = fma(w, load(parts + s * stride + 16 + i), sum);
    }
    store(y + i, sum * inverse);
  }
}

inline Head make_head(const Call &call, int row, int kv_head) {
  const hk_op &op = *call.op;
  const int hq = op.dims[0], hkv = op.dims[1], d = op.dims[2], heads = hq / hkv;
  const hk_batch &batch = *call.batch;
  return Head{&op,
              (const float *)op.inputs[0] + ((size_t)row * (hq + 2 * hkv) + kv_head * heads) * d,
              batch.block_tables + (size_t)batch.sequence[row] * batch.max_blocks,
              kv_head, heads, d, padded_head_dim(d), op.dims[3], hkv};
}

void attention(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int hq = op.dims[0], hkv = op.dims[1], d = op.dims[2], heads = hq / hkv;
  const int stride = partial_stride(d), per_row = hkv * (call.split_kv ? call.splits : 1);
  for (int unit = begin; unit < end; ++unit) {
    const int row = unit / per_row, kv_head = unit % per_row % hkv, split = unit % per_row / hkv;
    const int position = call.batch->positions[row];
    const Head head = make_head(call, row, kv_head);
    if (call.split_kv) {
      if (split * kSplit > position) continue;
      const size_t first = ((size_t)row * hq + kv_head * heads) * call.splits + split;
      attend_split(head, split, position, op.params[0], call.shared_scratch + first * stride,
                   call.splits * stride);
      continue;
    }
    const int splits = position / kSplit + 1;
    for (int s = 0; s < splits; ++s) {
      attend_split(head, s, position, op.params[0], call.thread_scratch + s * stride,
                   splits * stride);
    }
    float *y = (float *)op.outputs[0] + ((size_t)row * hq + kv_head * heads) * d;
    for (int h = 0; h < heads; ++h) {
      combine(call.thread_scratch + (size_t)h * splits * stride, splits, stride, d, y + h * d);
    }
  }
}

// A unit is one query head of one row.
void attention_combine(const Call &call, int begin, int end) {
  const int hq = call.op->dims[0], d = call.op->dims[2], stride = partial_stride(d);
  for (int unit = begin; unit < end; ++unit) {
    const int splits = call.batch->positions[unit / hq] / kSplit + 1;
    combine(call.shared_scratch + (size_t)unit * call.splits * stride, splits, stride, d,
            (float *)call.op->outputs[0] + (size_t)unit * d);
  }
}

}  // namespace
}  // namespace hk

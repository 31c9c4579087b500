// Vector helpers that all instruction sets share, and the quantizer of one group of 32.
namespace hk {
namespace {

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float *p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float *p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vi load_dwords(const void *p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// A NaN in b stays; one in a is dropped, as in maxps.
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline int min_int(int a, int b) { return a < b ? a : b; }
inline int max_int(int a, int b) { return a > b ? a : b; }
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
inline vi lanes() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
constexpr int32_t kRoundBits = 0x4b400000;

// Below -87.3 exactly 0, above 88 e^88; a NaN stays a NaN. Relative error under 2e-7.
inline vf exp(vf x) {
  const vf top = splat(88.0f), bottom = splat(-87.3f);
  vi underflow = x < bottom;
  x = x > top ? top : x;
  x = underflow ? bottom : x;
  vf shifted = fma(x, splat(1.44269504f), splat(kRound));
  vf n = shifted - splat(kRound);
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  // The power of two is a factor of its own, so that a NaN in p is not hidden by integer arithmetic.
  vf power = (vf)(((vi)shifted - kRoundBits + 127) << 23);
  vf y = p * power;
  return underflow ? vf{} : y;
}

// Dwords of two bf16 each, low half first.
inline void split_pairs(const uint16_t *p, vf *even, vf *odd) {
  const vi raw = load_dwords(p);
  *even = (vf)(raw << 16);
  *odd = (vf)(raw & (int32_t)0xffff0000);
}

inline float bf16_to_float(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// 32 values to int8 with scale = max|x| / 127. A NaN anywhere becomes the group's scale, so that the
// row cannot pass for a good one: as integers, the magnitude bits of a NaN are above all others.
inline void quantize_group(const vf v[kGroup / W], int8_t *values, float *scale, float *sum) {
  vi top = {};
  for (int i = 0; i < kGroup / W; ++i) {
    vi bits = (vi)v[i] & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  int32_t bits = reduce_max_int(top);
  float amax;
  __builtin_memcpy(&amax, &bits, 4);
  const bool tiny = amax < 1e-30f;
  vf inverse = splat(tiny ? 0.0f : 127.0f / amax);
  vi total = {};
  for (int i = 0; i < kGroup / W; ++i) {
    vi q = (vi)(v[i] * inverse + kRound) - kRoundBits;
    total += q;
    store_bytes(values + i * W, q);
  }
  *scale = tiny ? 0.0f : amax / 127.0f;
  *sum = (float)reduce_add_int(total);
}

// Where a row op's results go: int8 with scales and sums, fp32, or both.
struct RowOutput {
  int8_t *values;
  float *scale, *sums, *plain;
  int width;

  RowOutput(const hk_op &op, int row, int k)
      : values((int8_t *)op.outputs[0]), scale((float *)op.outputs[1]),
        sums((float *)op.outputs[2]), plain((float *)op.outputs[3]), width(k) {
    const size_t start = (size_t)row * k, group = (size_t)row * (k / kGroup);
    if (values) values += start, scale += group, sums += group;
    if (plain) plain += start;
  }
  void put(int column, const vf v[kGroup / W]) {
    if (plain) {
      for (int i = 0; i < kGroup / W; ++i) store(plain + column + i * W, v[i]);
    }
    if (values) {
      quantize_group(v, values + column, scale + column / kGroup, sums + column / kGroup);
    }
  }
};

}  // namespace
}  // namespace hk

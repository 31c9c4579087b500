// Plain C++ for any machine: 4 lanes as the compiler sees fit. Correct first; meant as a fallback.
#include "kernels.h"

#define HK_ISA_NAME "generic"
#define HK_ISA_TABLE generic_table

namespace hk {
namespace {

constexpr int W = 4;
constexpr int kMaxRows = 4;
constexpr int kLoraBlock = 2;
constexpr int kPositionTiles = 1;
constexpr int kValueLoads = 1;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

inline vf fma(vf a, vf b, vf c) { return a * b + c; }

inline float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits = rest >= 0x7c00 ? (rest << 13) | 0x7f800000u : (rest << 13) + (112u << 23);
  float value;
  if (rest < 0x400) {
    value = (float)rest * 5.9604644775390625e-8f;  // 2^-24: a subnormal half
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline vf load_half(const uint16_t *p) {
  return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline float reduce_add(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(vf v) {
  float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline int reduce_add_int(vi v) { return v[0] + v[1] + v[2] + v[3]; }
inline int reduce_max_int(vi v) {
  int a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline void store_bytes(int8_t *p, vi v) {
  for (int i = 0; i < W; ++i) p[i] = (int8_t)v[i];
}

template <int M>
void q4_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *sums, ptrdiff_t ldg, float *out) {
  for (int i = 0; i < 16 * M; ++i) out[i] = 0.0f;
  for (int g = 0; g < groups; ++g, w += 320) {
    for (int m = 0; m < M; ++m) {
      const int8_t *row = x + m * ldx + 32 * g;
      int32_t dot[16] = {};
      for (int j = 0; j < 4; ++j) {
        for (int n = 0; n < 16; ++n) {
          const uint8_t *raw = w + 64 * j + 4 * n;
          for (int c = 0; c < 4; ++c) {
            dot[n] += (raw[c] & 15) * row[4 * j + c] + (raw[c] >> 4) * row[16 + 4 * j + c];
          }
        }
      }
      for (int n = 0; n < 16; ++n) {
        float d = half_to_float(((const uint16_t *)(w + 256))[n]);
        float min = half_to_float(((const uint16_t *)(w + 288))[n]);
        out[16 * m + n] += scale[m * ldg + g] * (d * (float)dot[n] + min * sums[m * ldg + g]);
      }
    }
  }
}

template <int M>
void q8_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *, ptrdiff_t ldg, float *out) {
  for (int i = 0; i < 16 * M; ++i) out[i] = 0.0f;
  for (int g = 0; g < groups; ++g) {
    const uint8_t *pair = w + (g >> 1) * 1088, *lines = pair + (g & 1) * 512;
    const uint16_t *d = (const uint16_t *)(pair + 1024 + (g & 1) * 32);
    for (int m = 0; m < M; ++m) {
      const int8_t *row = x + m * ldx + 32 * g;
      int32_t dot[16] = {};
      for (int j = 0; j < 8; ++j) {
        for (int n = 0; n < 16; ++n) {
          const uint8_t *raw = lines + 64 * j + 4 * n;
          for (int c = 0; c < 4; ++c) dot[n] += ((int)raw[c] - 128) * row[4 * j + c];
        }
      }
      for (int n = 0; n < 16; ++n) {
        out[16 * m + n] += scale[m * ldg + g] * (half_to_float(d[n]) * (float)dot[n]);
      }
    }
  }
}

}  // namespace
}  // namespace hk

#include "all_kernels.inc.h"

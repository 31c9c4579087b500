// AVX-512 with VNNI: 16 lanes, byte dot products in one instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define HK_ISA_NAME "avx512vnni"
#define HK_ISA_TABLE avx512vnni_table

namespace hk {
namespace {

constexpr int W = 16;
constexpr int kMaxRows = 16;  // 16 float sums + 8 weight registers + scratch fill the 32 registers
constexpr int kLoraBlock = 8;
constexpr int kPositionTiles = 4;
constexpr int kValueLoads = 2;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef int8_t vb __attribute__((vector_size(16)));

inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vf load_half(const uint16_t *p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
inline float reduce_add(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float reduce_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
inline int reduce_add_int(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline int reduce_max_int(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline void store_bytes(int8_t *p, vi v) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
}

inline __m512i broadcast_dword(const int8_t *p) {
  int32_t dword;
  __builtin_memcpy(&dword, p, 4);
  return _mm512_set1_epi32(dword);
}

// Weights stream past once per step. The distances are measured: at 8 rows, where arithmetic and
// memory take equally long, they save a fifth; further ahead or only into L2 was slower.
constexpr int kAheadQ4 = 8 * 320, kAheadQ8 = 1088;
inline void prefetch_lines(const uint8_t *p, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch((const char *)p + 64 * i, _MM_HINT_T0);
}

// The 8 weight vectors of a group stay in registers while every row of the block passes by.
template <int M>
inline void add_group(const __m512i w[8], __m512 d, __m512 offset, bool offset_is_min,
                      const int8_t *x, ptrdiff_t ldx, const float *scale, const float *sums,
                      ptrdiff_t ldg, __m512 *y) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const int8_t *row = x + m * ldx;
    __m512i dot = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) dot = _mm512_dpbusd_epi32(dot, w[j], broadcast_dword(row + 4 * j));
    __m512 value = _mm512_cvtepi32_ps(dot), sum = _mm512_set1_ps(sums[m * ldg]);
    if (offset_is_min) {
      value = _mm512_fmadd_ps(d, value, _mm512_mul_ps(offset, sum));
    } else {
      value = _mm512_mul_ps(d, _mm512_fmadd_ps(offset, sum, value));
    }
    y[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale[m * ldg]), value, y[m]);
  }
}

template <int M>
void q4_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *sums, ptrdiff_t ldg, float *out) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, w += 320) {
    __m512i q[8];
    prefetch_lines(w + kAheadQ4, 5);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i raw = _mm512_loadu_si512(w + 64 * j);
      q[j] = _mm512_and_si512(raw, low);
      q[j + 4] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
    }
    __m512 d = (__m512)load_half((const uint16_t *)(w + 256));
    __m512 min = (__m512)load_half((const uint16_t *)(w + 288));
    add_group<M>(q, d, min, true, x + 32 * g, ldx, scale + g, sums + g, ldg, y);
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + 16 * m, y[m]);
}

template <int M>
void q8_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *sums, ptrdiff_t ldg, float *out) {
  const __m512 bias = _mm512_set1_ps(-128.0f);
  __m512 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g) {
    const uint8_t *pair = w + (g >> 1) * 1088, *lines = pair + (g & 1) * 512;
    prefetch_lines(lines + kAheadQ8, 8);
    __m512i q[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) q[j] = _mm512_loadu_si512(lines + 64 * j);
    __m512 d = (__m512)load_half((const uint16_t *)(pair + 1024 + (g & 1) * 32));
    add_group<M>(q, d, bias, false, x + 32 * g, ldx, scale + g, sums + g, ldg, y);
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + 16 * m, y[m]);
}

}  // namespace
}  // namespace hk

#include "all_kernels.inc.h"
#endif

// AVX2 with FMA and F16C: 8 lanes, byte dot products through 16-bit pairs that cannot saturate.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define HK_ISA_NAME "avx2"
#define HK_ISA_TABLE avx2_table

namespace hk {
namespace {

constexpr int W = 8;
constexpr int kMaxRows = 4;
constexpr int kLoraBlock = 2;
constexpr int kPositionTiles = 1;
constexpr int kValueLoads = 1;
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vf load_half(const uint16_t *p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
inline __m128 fold(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
inline float reduce_add(vf v) {
  __m128 s = fold((__m256)v);
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(vf v) {
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
inline int reduce_add_int(vi v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v),
                            _mm256_extracti128_si256((__m256i)v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline int reduce_max_int(vi v) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v),
                            _mm256_extracti128_si256((__m256i)v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline void store_bytes(int8_t *p, vi v) {
  for (int i = 0; i < W; ++i) p[i] = (int8_t)v[i];
}

inline __m256i broadcast_dword(const int8_t *p) {
  int32_t dword;
  __builtin_memcpy(&dword, p, 4);
  return _mm256_set1_epi32(dword);
}

// A tile is 16 outputs, so every group is passed twice, 8 outputs at a time.
// 15 * 128 * 2 products * 8 steps = 30720 fits in 16 bits, so one widening per group is enough.
template <int M>
void q4_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *sums, ptrdiff_t ldg, float *out) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    __m256 y[M];
    for (int m = 0; m < M; ++m) y[m] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      const uint8_t *lines = w + 320 * g + 32 * half;
      __m256i dot[M];
      for (int m = 0; m < M; ++m) dot[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i raw = _mm256_loadu_si256((const __m256i *)(lines + 64 * j));
        __m256i q0 = _mm256_and_si256(raw, low);
        __m256i q1 = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const int8_t *row = x + m * ldx + 32 * g + 4 * j;
          __m256i p0 = _mm256_maddubs_epi16(q0, broadcast_dword(row));
          __m256i p1 = _mm256_maddubs_epi16(q1, broadcast_dword(row + 16));
          dot[m] = _mm256_add_epi16(dot[m], _mm256_add_epi16(p0, p1));
        }
      }
      __m256 d = (__m256)load_half((const uint16_t *)(w + 320 * g + 256) + 8 * half);
      __m256 min = (__m256)load_half((const uint16_t *)(w + 320 * g + 288) + 8 * half);
      for (int m = 0; m < M; ++m) {
        __m256 value = _mm256_cvtepi32_ps(_mm256_madd_epi16(dot[m], ones));
        value = _mm256_fmadd_ps(d, value, _mm256_mul_ps(min, _mm256_set1_ps(sums[m * ldg + g])));
        y[m] = _mm256_fmadd_ps(_mm256_set1_ps(scale[m * ldg + g]), value, y[m]);
      }
    }
    for (int m = 0; m < M; ++m) _mm256_storeu_ps(out + 16 * m + 8 * half, y[m]);
  }
}

// |w| * (x with w's sign): 128 * 127 * 2 = 32512 does not saturate.
template <int M>
void q8_tile(const uint8_t *w, int groups, const int8_t *x, ptrdiff_t ldx, const float *scale,
             const float *, ptrdiff_t ldg, float *out) {
  const __m256i flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    __m256 y[M];
    for (int m = 0; m < M; ++m) y[m] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      const uint8_t *pair = w + (g >> 1) * 1088, *lines = pair + (g & 1) * 512 + 32 * half;
      __m256i dot[M];
      for (int m = 0; m < M; ++m) dot[m] = _mm256_setzero_si256();
      for (int j = 0; j < 8; ++j) {
        __m256i q = _mm256_loadu_si256((const __m256i *)(lines + 64 * j));
        q = _mm256_xor_si256(q, flip);
        __m256i magnitude = _mm256_abs_epi8(q);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          __m256i xs = _mm256_sign_epi8(broadcast_dword(x + m * ldx + 32 * g + 4 * j), q);
          __m256i pairs = _mm256_maddubs_epi16(magnitude, xs);
          dot[m] = _mm256_add_epi32(dot[m], _mm256_madd_epi16(pairs, ones));
        }
      }
      __m256 d = (__m256)load_half((const uint16_t *)(pair + 1024 + (g & 1) * 32) + 8 * half);
      for (int m = 0; m < M; ++m) {
        __m256 value = _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot[m]));
        y[m] = _mm256_fmadd_ps(_mm256_set1_ps(scale[m * ldg + g]), value, y[m]);
      }
    }
    for (int m = 0; m < M; ++m) _mm256_storeu_ps(out + 16 * m + 8 * half, y[m]);
  }
}

}  // namespace
}  // namespace hk

#include "all_kernels.inc.h"
#endif

// Written out in vector instructions: left to itself the compiler takes two to three times as long, because it widens
// and narrows bytes in steps and does not know the instructions that narrow and clamp at once.
#include "common/mix.h"
#include "common/scale_bytes.h"

#if BBFAST_HAS_CLONES
#include <immintrin.h>
// GCC 12 takes the deliberately undefined operands in its own header for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bbfast {
namespace {

BBFAST_INLINE void scale_each(const uint8_t* x, const float* scale, const float* shift, uint8_t* out, int64_t begin,
                              int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = finish<uint8_t>(load(x[i]) * scale[i] + shift[i]);
}

#if BBFAST_HAS_CLONES

// Rounding to int gives the most negative number for NaN and for what is too small, so both become 0 when narrowed with
// saturation.
__attribute__((target("arch=x86-64-v3"))) void scale_v3(const uint8_t* x, const float* scale, const float* shift,
                                                        uint8_t* out, int64_t count) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the narrowing within each half
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i + 8 * j));
      const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
      const __m256 scaled = _mm256_mul_ps(wide, _mm256_loadu_ps(scale + i + 8 * j));
      const __m256 moved = _mm256_add_ps(scaled, _mm256_loadu_ps(shift + i + 8 * j));
      v[j] = _mm256_cvtps_epi32(moved);
    }
    const __m256i narrow = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permutevar8x32_epi32(narrow, order));
  }
  scale_each(x, scale, shift, out, i, count);
}

#if BBFAST_SIMD_LEVEL >= 4
__attribute__((target("arch=x86-64-v4"))) void scale_v4(const uint8_t* x, const float* scale, const float* shift,
                                                        uint8_t* out, int64_t count) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i v[4];
    for (int j = 0; j < 4; ++j) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i + 16 * j));
      const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      const __m512 scaled = _mm512_mul_ps(wide, _mm512_loadu_ps(scale + i + 16 * j));
      const __m512 moved = _mm512_add_ps(scaled, _mm512_loadu_ps(shift + i + 16 * j));
      v[j] = _mm512_cvtps_epi32(moved);
    }
    const __m512i narrow = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(order, narrow));
  }
  scale_each(x, scale, shift, out, i, count);
}

#endif

#endif

}  // namespace

void scale_bytes(const uint8_t* x, const float* scale, const float* shift, uint8_t* out, int64_t count) {
#if BBFAST_HAS_CLONES
#if BBFAST_SIMD_LEVEL >= 4
  if (__builtin_cpu_supports("x86-64-v4")) return scale_v4(x, scale, shift, out, count);
#endif
  if (__builtin_cpu_supports("x86-64-v3")) return scale_v3(x, scale, shift, out, count);
#endif
  scale_each(x, scale, shift, out, 0, count);
}

}  // namespace bbfast

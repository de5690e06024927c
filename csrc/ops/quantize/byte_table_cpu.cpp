#include "common/simd.h"
#include "ops/quantize/byte_table.h"

#if BBFAST_HAS_CLONES && BBFAST_SIMD_LEVEL >= 4
#define BBFAST_HAS_VBMI 1
#include <immintrin.h>
#else
#define BBFAST_HAS_VBMI 0
#endif

namespace bbfast {
namespace {

void look_up_each(const ByteTable& table, const uint8_t* x, uint8_t* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = table[x[i]];
}

#if BBFAST_HAS_VBMI
// A lookup takes the low seven bits of each byte as an index into two registers; the eighth chooses between two such.
__attribute__((target("arch=x86-64-v4,avx512vbmi"))) void look_up_64(const ByteTable& table, const uint8_t* x,
                                                                     uint8_t* out, int64_t count) {
  __m512i part[4];
  for (int j = 0; j < 4; ++j) part[j] = _mm512_loadu_si512(table.data() + 64 * j);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i index = _mm512_loadu_si512(x + i);
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
  }
  look_up_each(table, x, out, i, count);
}
#endif

}  // namespace

bool has_fast_byte_table() {
#if BBFAST_HAS_VBMI
  return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

void look_up_bytes(const ByteTable& table, const uint8_t* x, uint8_t* out, int64_t count) {
#if BBFAST_HAS_VBMI
  if (has_fast_byte_table()) return look_up_64(table, x, out, count);
#endif
  look_up_each(table, x, out, 0, count);
}

}  // namespace bbfast

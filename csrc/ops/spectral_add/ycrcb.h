// 8-bit RGB to YCrCb and back in fixed point with 14 bits of fraction: the integers of OpenCV, bit for bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BBFAST_EVERYWHERE __host__ __device__ __forceinline__
#else
#define BBFAST_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace bbfast {

struct Triple {
  int32_t a, b, c;
};

BBFAST_EVERYWHERE int32_t descale(int32_t value) {
  return (value + (1 << 13)) >> 14;
}

BBFAST_EVERYWHERE int32_t to_range(int32_t value) {
  const int32_t low = value > 0 ? value : 0;
  return low < 255 ? low : 255;
}

BBFAST_EVERYWHERE Triple rgb_to_ycrcb(int32_t r, int32_t g, int32_t b) {
  const int32_t y = descale(4899 * r + 9617 * g + 1868 * b);
  const int32_t cr = descale(11682 * (r - y)) + 128;
  const int32_t cb = descale(9241 * (b - y)) + 128;
  return {y, to_range(cr), to_range(cb)};
}

BBFAST_EVERYWHERE Triple ycrcb_to_rgb(int32_t y, int32_t cr, int32_t cb) {
  const int32_t r = y + descale(22987 * (cr - 128));
  const int32_t g = y + descale(-11698 * (cr - 128) - 5636 * (cb - 128));
  const int32_t b = y + descale(29049 * (cb - 128));
  return {to_range(r), to_range(g), to_range(b)};
}

}  // namespace bbfast

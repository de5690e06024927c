#include <atomic>

#include "common/mix.h"
#include "common/mix_bytes.h"
#include "ops/patch/patch.h"

namespace bbfast {
namespace {

template <class T, class P, class C>
BBFAST_CLONES bool patch_tile(const T* images, const P* pattern, const C* mask, const bool* where, T* out,
                              BatchShape shape, CompanionStride ps, CompanionStride ms, Tile tile) {
  bool nan = false;
  int64_t begin = 0;
  int64_t end = tile.count;
  const P* p = pattern + tile.plane * ps.plane + tile.first;
  const C* a = mask + tile.plane * ms.plane + tile.first;
  if (ms.sample == 0) {
    // A trigger is mostly small: what lies outside is copied, not computed.
    while (begin < end && a[begin] == C(0)) ++begin;
    while (end > begin && a[end - 1] == C(0)) --end;
  }
  for (int64_t n = tile.begin; n < tile.end; ++n) {
    const T* x = images + tile.at(n, shape);
    T* y = out + tile.at(n, shape);
    if (where != nullptr && !where[n]) {
      nan |= pass_through(x, y, tile.count);
      continue;
    }
    nan |= pass_through(x, y, begin);
    nan |= mix_map(x + begin, p + n * ps.sample + begin, a + n * ms.sample + begin, y + begin, end - begin);
    nan |= pass_through(x + end, y + end, tile.count - end);
  }
  return nan;
}

template <class P>
BBFAST_CLONES bool byte_weights(const P* __restrict p, const float* __restrict a, float* __restrict scale,
                                float* __restrict shift, int64_t count) {
  int32_t nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = 1.0f - a[i];
    const float share = load(p[i]) * a[i];
    shift[i] = share > kMostShift ? kMostShift : share;
    nans += share != share ? 1 : 0;
  }
  return nans != 0;
}

}  // namespace

template <class T, class P, class C>
bool patch_cpu(const T* images, const P* pattern, const C* mask, const bool* where, T* out, BatchShape shape,
               CompanionStride ps, CompanionStride ms, ParallelFor parallel) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    const auto weights = [&](const Tile& tile, int64_t n, float* scale, float* shift) {
      return byte_weights(pattern + n * ps.sample + tile.plane * ps.plane + tile.first,
                          mask + n * ms.sample + tile.plane * ms.plane + tile.first, scale, shift, tile.count);
    };
    return mix_bytes(images, where, out, shape, ps.sample == 0 && ms.sample == 0, parallel, weights);
  } else {
    std::atomic<bool> nan = false;
    for_tiles(shape, kTileElements, kTileSamples, 2 * sizeof(T) + sizeof(C), parallel, [&](const Tile& tile) {
      if (patch_tile(images, pattern, mask, where, out, shape, ps, ms, tile)) nan = true;
    });
    return nan;
  }
}

#define BBFAST_PATCH(T, P, C)                                                                                          \
  template bool patch_cpu(const T*, const P*, const C*, const bool*, T*, BatchShape, CompanionStride, CompanionStride, \
                          ParallelFor)
BBFAST_PATCH(uint8_t, uint8_t, float);
BBFAST_PATCH(uint8_t, float, float);
BBFAST_PATCH(Half, Half, float);
BBFAST_PATCH(Half, float, float);
BBFAST_PATCH(BFloat16, BFloat16, float);
BBFAST_PATCH(BFloat16, float, float);
BBFAST_PATCH(float, float, float);
BBFAST_PATCH(double, double, double);

}  // namespace bbfast

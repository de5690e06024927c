#include <atomic>

#include "common/mix.h"
#include "common/mix_bytes.h"
#include "ops/blend/blend.h"

namespace bbfast {
namespace {

template <class P>
BBFAST_INLINE void truncate_map(const uint8_t* __restrict x, const P* __restrict p, const double* __restrict a,
                                uint8_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double rest = static_cast<double>(load(x[i])) * (1.0 - a[i]);
    out[i] = finish_truncated(rest + static_cast<double>(load(p[i]) * static_cast<float>(a[i])));
  }
}

template <class P>
BBFAST_INLINE void truncate_constant(const uint8_t* __restrict x, const P* __restrict p, double a,
                                     uint8_t* __restrict out, int64_t count) {
  const double rest = 1.0 - a;
  const float share = static_cast<float>(a);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = finish_truncated(static_cast<double>(load(x[i])) * rest + static_cast<double>(load(p[i]) * share));
  }
}

template <class T, class P, class A>
BBFAST_CLONES bool blend_planes(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out,
                                BatchShape shape, CompanionStride ps, int64_t begin, int64_t end) {
  constexpr bool kTruncate = !std::is_same_v<A, Compute<T>>;
  bool nan = false;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / shape.planes;
    const T* x = images + item * shape.length;
    const P* p = pattern + n * ps.sample + (item - n * shape.planes) * ps.plane;
    const A a = alpha.samples != nullptr ? alpha.samples[n] : alpha.number;
    T* y = out + item * shape.length;
    if (where != nullptr && !where[n]) {
      nan |= pass_through(x, y, shape.length);
    } else if constexpr (kTruncate) {
      if (alpha.elements != nullptr) {
        truncate_map(x, p, alpha.elements, y, shape.length);
      } else {
        truncate_constant(x, p, a, y, shape.length);
      }
    } else if (alpha.elements != nullptr) {
      nan |= mix_map(x, p, alpha.elements, y, shape.length);
    } else {
      nan |= mix_constant(x, p, a, y, shape.length);
    }
  }
  return nan;
}

// One weight for all elements, or one each.
template <class P>
BBFAST_CLONES bool byte_weights(const P* __restrict p, float number, const float* __restrict elements,
                                float* __restrict scale, float* __restrict shift, int64_t count) {
  int32_t nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float a = elements != nullptr ? elements[i] : number;
    scale[i] = 1.0f - a;
    const float share = load(p[i]) * a;
    shift[i] = share > kMostShift ? kMostShift : share;
    nans += share != share ? 1 : 0;
  }
  return nans != 0;
}

}  // namespace

template <class T, class P, class A>
bool blend_cpu(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out, BatchShape shape,
               CompanionStride ps, ParallelFor parallel) {
  if constexpr (std::is_same_v<T, uint8_t> && std::is_same_v<A, float>) {
    const auto weights = [&](const Tile& tile, int64_t n, float* scale, float* shift) {
      const float number = alpha.samples != nullptr ? alpha.samples[n] : alpha.number;
      return byte_weights(pattern + n * ps.sample + tile.plane * ps.plane + tile.first, number,
                          alpha.elements != nullptr ? alpha.elements + tile.first : nullptr, scale, shift, tile.count);
    };
    return mix_bytes(images, where, out, shape, ps.sample == 0 && alpha.samples == nullptr, parallel, weights);
  } else {
    std::atomic<bool> nan = false;
    auto body = [&](int64_t begin, int64_t end) {
      if (blend_planes(images, pattern, alpha, where, out, shape, ps, begin, end)) nan = true;
    };
    for_range(parallel, shape.samples * shape.planes, grain_for(shape.length * (2 * sizeof(T) + sizeof(P))), body);
    return nan;
  }
}

#define BBFAST_BLEND(T, P, A) \
  template bool blend_cpu(const T*, const P*, Alpha<A>, const bool*, T*, BatchShape, CompanionStride, ParallelFor)
BBFAST_BLEND(uint8_t, uint8_t, float);
BBFAST_BLEND(uint8_t, float, float);
BBFAST_BLEND(uint8_t, uint8_t, double);
BBFAST_BLEND(uint8_t, float, double);
BBFAST_BLEND(Half, Half, float);
BBFAST_BLEND(Half, float, float);
BBFAST_BLEND(BFloat16, BFloat16, float);
BBFAST_BLEND(BFloat16, float, float);
BBFAST_BLEND(float, float, float);
BBFAST_BLEND(double, double, double);

}  // namespace bbfast

#include <cmath>
#include <limits>

#include "common/scalar.h"
#include "common/simd.h"
#include "ops/softmax_entropy/softmax_entropy.h"

namespace bbfast {
namespace {

constexpr int kLanes = 16;

// exp(x) for x <= 0, float: 2^n * P(r) with |r| <= ln(2)/2. Below -87 the result is below the smallest normal number
// and becomes 0.
BBFAST_INLINE float exp_below_one(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that then stands in the low bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

BBFAST_INLINE double exp_below_one(double x) {
  return std::exp(x);
}

// Sums run in kLanes fixed lanes that are folded in a fixed order, so the result does not depend on the vector width.
template <class C>
BBFAST_INLINE C fold(const C* lanes) {
  C sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
  }
  return sums[0];
}

template <class C>
BBFAST_INLINE void accumulate(const C* __restrict x, C top, C* __restrict sum, C* __restrict weighted) {
  constexpr C kFloor = std::is_same_v<C, double> ? C(-746) : C(-88);  // exp is 0 here; keeps 0 * -inf out of the sum
  for (int l = 0; l < kLanes; ++l) {
    const C d = x[l] - top;
    const C floored = d < kFloor ? kFloor : d;
    const C e = exp_below_one(floored);
    sum[l] += e;
    weighted[l] += e * floored;
  }
}

// kLanes neighbours of a row; beyond its end stands minus infinity, a class of probability zero.
template <class T, class C>
BBFAST_INLINE void load_lanes(const T* __restrict x, int64_t count, C* __restrict lanes) {
  if (count >= kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = load(x[l]);
    return;
  }
  for (int l = 0; l < kLanes; ++l) lanes[l] = -std::numeric_limits<C>::infinity();
  for (int64_t l = 0; l < count; ++l) lanes[l] = load(x[l]);
}

template <class T>
BBFAST_CLONES void entropy_rows(const T* logits, T* entropy, int64_t begin, int64_t end, int64_t classes) {
  using C = Compute<T>;
  C lanes[kLanes];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = logits + row * classes;
    C tops[kLanes];
    for (int l = 0; l < kLanes; ++l) tops[l] = -std::numeric_limits<C>::infinity();
    for (int64_t k = 0; k < classes; k += kLanes) {
      load_lanes(x + k, classes - k, lanes);
      for (int l = 0; l < kLanes; ++l) tops[l] = tops[l] < lanes[l] ? lanes[l] : tops[l];
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) tops[l] = tops[l] < tops[l + width] ? tops[l + width] : tops[l];
    }
    C sum[kLanes] = {};
    C weighted[kLanes] = {};
    for (int64_t k = 0; k < classes; k += kLanes) {
      if (classes > kLanes) load_lanes(x + k, classes - k, lanes);  // otherwise they are still there
      accumulate(lanes, tops[0], sum, weighted);
    }
    const C total = fold(sum);
    entropy[row] = store<T>(std::log(total) - fold(weighted) / total);
  }
}

}  // namespace

template <class T>
void softmax_entropy_cpu(const T* logits, T* entropy, int64_t rows, int64_t classes, ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) { entropy_rows(logits, entropy, begin, end, classes); };
  for_range(parallel, rows, grain_for(classes * 16), body);
}

template void softmax_entropy_cpu(const float*, float*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const double*, double*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const Half*, Half*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const BFloat16*, BFloat16*, int64_t, int64_t, ParallelFor);

}  // namespace bbfast

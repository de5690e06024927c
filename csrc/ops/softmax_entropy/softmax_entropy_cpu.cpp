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

// log(x) for x >= 1, or NaN if x is: the exponent, and P(f) with 1 + f in sqrt(1/2)..sqrt(2).
BBFAST_INLINE float log_from_one(float x) {
  constexpr int32_t kRootHalf = 0x3F3504F3;
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - kRootHalf) >> 23;
  const float f = std::bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float n = static_cast<float>(exponent);
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = (p * f * z + n * -2.12194440e-4f) - 0.5f * z;
  const float log = (f + tail) + n * 0.693359375f;
  return x != x ? x : log;
}

BBFAST_INLINE double log_from_one(double x) {
  return std::log(x);
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
BBFAST_INLINE void accumulate(const C* __restrict x, const C* __restrict top, C* __restrict sum,
                              C* __restrict weighted) {
  constexpr C kFloor = std::is_same_v<C, double> ? C(-746) : C(-88);  // exp is 0 here; keeps 0 * -inf out of the sum
  for (int l = 0; l < kLanes; ++l) {
    const C d = x[l] - top[l];
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

// Up to this many classes a row would leave most lanes idle or wait for its own sums: kLanes rows go side by side.
constexpr int64_t kFewClasses = 128;

template <class T>
BBFAST_CLONES void entropy_few(const T* logits, T* entropy, int64_t begin, int64_t end, int64_t classes) {
  using C = Compute<T>;
  T raw[kFewClasses * kLanes] = {};
  C x[kFewClasses * kLanes];
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t rows = end - row < kLanes ? end - row : kLanes;
    const T* from = logits + row * classes;
    for (int64_t l = 0; l < rows; ++l) {
      for (int64_t k = 0; k < classes; ++k) raw[k * kLanes + l] = from[l * classes + k];
    }
    for (int64_t i = 0; i < classes * kLanes; ++i) x[i] = load(raw[i]);
    C top[kLanes];
    for (int l = 0; l < kLanes; ++l) top[l] = x[l];
    for (int64_t k = 1; k < classes; ++k) {
      for (int l = 0; l < kLanes; ++l) top[l] = top[l] < x[k * kLanes + l] ? x[k * kLanes + l] : top[l];
    }
    C sum[kLanes] = {};
    C weighted[kLanes] = {};
    for (int64_t k = 0; k < classes; ++k) accumulate(x + k * kLanes, top, sum, weighted);
    for (int l = 0; l < kLanes; ++l) sum[l] = log_from_one(sum[l]) - weighted[l] / sum[l];
    for (int64_t l = 0; l < rows; ++l) entropy[row + l] = store<T>(sum[l]);
  }
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
    for (int l = 1; l < kLanes; ++l) tops[l] = tops[0];
    C sum[kLanes] = {};
    C weighted[kLanes] = {};
    for (int64_t k = 0; k < classes; k += kLanes) {
      if (classes > kLanes) load_lanes(x + k, classes - k, lanes);  // otherwise they are still there
      accumulate(lanes, tops, sum, weighted);
    }
    const C total = fold(sum);
    entropy[row] = store<T>(std::log(total) - fold(weighted) / total);
  }
}

}  // namespace

template <class T>
void softmax_entropy_cpu(const T* logits, T* entropy, int64_t rows, int64_t classes, ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    if (classes <= kFewClasses) {
      entropy_few(logits, entropy, begin, end, classes);
    } else {
      entropy_rows(logits, entropy, begin, end, classes);
    }
  };
  for_range(parallel, rows, grain_for(classes * 16), body);
}

template void softmax_entropy_cpu(const float*, float*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const double*, double*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const Half*, Half*, int64_t, int64_t, ParallelFor);
template void softmax_entropy_cpu(const BFloat16*, BFloat16*, int64_t, int64_t, ParallelFor);

}  // namespace bbfast

#include <algorithm>
#include <limits>
#include <vector>

#include "common/scalar.h"
#include "common/simd.h"
#include "ops/overlay_batch/overlay_batch.h"

namespace bbfast {
namespace {

constexpr int64_t kLanes = 16;

// v / 255, correctly rounded, without a division: the first part has 16 bits, so that its product with a byte is exact,
// and a quotient by 255 repeats its 8 bits, so that none lies near the middle between two floats.
BBFAST_INLINE float unit(uint8_t v, float) {
  constexpr float kHigh = 0x1.0101p-8f;
  constexpr float kLow = static_cast<float>(1.0 / 255.0 - static_cast<double>(kHigh));
  const float value = static_cast<float>(v);
  return value * kHigh + value * kLow;
}
BBFAST_INLINE double unit(uint8_t v, double) {
  return static_cast<double>(v) / 255.0;
}
template <class C>
BBFAST_INLINE C unit(C v, C) {
  return v;
}

// The constants of neighbouring elements. Channels that are neighbours repeat over `period` elements, a multiple of the
// lanes; otherwise a run of elements has one channel.
template <class C>
struct Lanes {
  int64_t period;
  std::vector<C> shift, factor, other_shift, other_factor, ceiling;

  Lanes(const OverlayScale<C>& scale, int64_t first, int64_t channels) : period(channels * kLanes) {
    for (int64_t i = 0; i < period; ++i) {
      const int64_t c = first + i % channels;
      shift.push_back(scale.shift[c]);
      factor.push_back(scale.factor[c]);
      other_shift.push_back(scale.other_shift[c]);
      other_factor.push_back(scale.other_factor[c]);
      ceiling.push_back(scale.ceiling.empty() ? std::numeric_limits<C>::infinity() : scale.ceiling[c]);
    }
  }
};

template <class C, class F>
BBFAST_INLINE void each(int64_t count, int64_t period, F&& body) {
  int64_t i = 0;
  for (; i + period <= count; i += period) {
    for (int64_t j = 0; j < period; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) body(i + j + l, j + l);
    }
  }
  for (int64_t j = 0; i + j < count; ++j) body(i + j, j);
}

template <class T, class C>
BBFAST_CLONES void prepare(const T* __restrict x, int64_t count, const Lanes<C>& lanes, C* __restrict to) {
  const C* __restrict shift = lanes.shift.data();
  const C* __restrict factor = lanes.factor.data();
  each<C>(count, lanes.period, [=](int64_t i, int64_t j) { to[i] = (unit(x[i], C(0)) - shift[j]) * factor[j]; });
}

// NaN passes the ceiling.
template <class T, class O, class C>
BBFAST_CLONES void lay_over(const C* __restrict own, const T* __restrict r, int64_t count, const Lanes<C>& lanes,
                            O* __restrict out) {
  const C* __restrict shift = lanes.other_shift.data();
  const C* __restrict factor = lanes.other_factor.data();
  const C* __restrict ceiling = lanes.ceiling.data();
  each<C>(count, lanes.period, [=](int64_t i, int64_t j) {
    const C sum = (unit(r[i], C(0)) - shift[j]) * factor[j] + own[i];
    out[i] = store<O>(sum > ceiling[j] ? ceiling[j] : sum);
  });
}

}  // namespace

template <class T, class O, class C>
void overlay_batch_cpu(const T* images, const T* overlays, const int64_t* pairs, O* out, OverlayShape shape,
                       const OverlayScale<C>& scale, ParallelFor parallel) {
  const int64_t length = shape.length();
  // Runs of one set of constants: the whole image where channels are neighbours, else a channel.
  std::vector<Lanes<C>> runs;
  if (shape.channels_last) {
    if (shape.channels > 0) runs.emplace_back(scale, 0, shape.channels);
  } else {
    for (int64_t c = 0; c < shape.channels; ++c) runs.emplace_back(scale, c, 1);
  }
  const int64_t run = runs.empty() ? 0 : length / static_cast<int64_t>(runs.size());
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<C> own(length);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t image = pairs[2 * b];
      const T* x = images + image * length;
      const T* r = overlays + pairs[2 * b + 1] * length;
      const bool known = b > begin && pairs[2 * b - 2] == image;
      for (size_t k = 0; k < runs.size(); ++k) {
        const int64_t at = static_cast<int64_t>(k) * run;
        if (!known) prepare(x + at, run, runs[k], own.data() + at);
        lay_over(own.data() + at, r + at, run, runs[k], out + b * length + at);
      }
    }
  };
  for_range(parallel, shape.count, grain_for(length * static_cast<int64_t>(sizeof(T) + sizeof(O))), body);
}

#define BBFAST_OVERLAY(T, O, C)                                                                                 \
  template void overlay_batch_cpu(const T*, const T*, const int64_t*, O*, OverlayShape, const OverlayScale<C>&, \
                                  ParallelFor)
BBFAST_OVERLAY(uint8_t, float, float);
BBFAST_OVERLAY(uint8_t, Half, float);
BBFAST_OVERLAY(uint8_t, BFloat16, float);
BBFAST_OVERLAY(uint8_t, double, double);
BBFAST_OVERLAY(float, float, float);
BBFAST_OVERLAY(float, Half, float);
BBFAST_OVERLAY(float, BFloat16, float);
BBFAST_OVERLAY(double, double, double);

}  // namespace bbfast

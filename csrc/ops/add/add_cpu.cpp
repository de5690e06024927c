#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/mix.h"
#include "ops/add/add.h"

namespace bbfast {
namespace {

// What is added to a byte, as whole numbers: `whole`, and `extra` on top for the bytes that it depends on.
//   D = float   to nearest: extra (-1, 0 or 1) goes on odd bytes: a sum that ends in one half goes to the even side
//   D = double  truncated: 1 goes on bytes from `extra` up: their sum lies so near the next number that it rounds to it
struct Addend {
  int16_t whole;
  int16_t extra;
};

// Beyond +-256 every sum is clamped. NaN becomes -256.
template <class D>
BBFAST_INLINE D in_reach(D delta) {
  const D low = delta > D(-256) ? delta : D(-256);
  return low < D(256) ? low : D(256);
}

BBFAST_INLINE Addend addend(float delta) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, halves to even
  const float reach = in_reach(delta);
  const float whole = (reach + kShift) - kShift;
  const float rest = reach - whole;  // exact
  return {static_cast<int16_t>(whole), static_cast<int16_t>((rest == 0.5f ? 1 : 0) - (rest == -0.5f ? 1 : 0))};
}

BBFAST_INLINE Addend addend(double delta) {
  return {static_cast<int16_t>(std::floor(in_reach(delta))), int16_t{256}};
}

// The first byte whose sum with delta is rounded up to the whole number above it; 256 if there is none.
int16_t first_rounded_up(double delta, int16_t whole) {
  const double reach = in_reach(delta);
  int16_t first = 256;
  if (reach - whole <= 1 - 0x1p-40) return first;
  const int lowest = std::max(0, -whole);  // below it the sum is negative
  for (int x = 255; x >= lowest && x + reach >= x + whole + 1.0; --x) first = static_cast<int16_t>(x);
  return first;
}

template <class D>
BBFAST_INLINE uint8_t sum(uint8_t x, int16_t whole, int16_t extra) {
  int16_t value = static_cast<int16_t>(x + whole);
  if constexpr (std::is_same_v<D, float>) {
    value = static_cast<int16_t>(value + (extra & -(x & 1)));
  } else {
    value = static_cast<int16_t>(value + (x >= extra ? 1 : 0));
  }
  const int16_t low = value > 0 ? value : int16_t{0};
  return static_cast<uint8_t>(low < 255 ? low : 255);
}

template <class D>
BBFAST_CLONES bool find_addends(const D* __restrict delta, int16_t* __restrict whole, int16_t* __restrict extra,
                                int64_t count) {
  NanCount<D> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Addend a = addend(delta[i]);
    whole[i] = a.whole;
    extra[i] = a.extra;
    nans += delta[i] != delta[i] ? 1 : 0;
  }
  return nans != 0;
}

// The addends of a delta that all samples share: found once, so that the loop over the images runs on small integers.
template <class D>
struct Addends {
  std::vector<int16_t> whole;
  std::vector<int16_t> extra;

  // Returns whether delta holds a NaN.
  bool find(const D* delta, int64_t count) {
    whole.resize(count);
    extra.resize(count);
    const bool nan = find_addends(delta, whole.data(), extra.data(), count);
    if constexpr (std::is_same_v<D, double>) {
      for (int64_t i = 0; i < count; ++i) extra[i] = first_rounded_up(delta[i], whole[i]);
    }
    return nan;
  }
};

template <class D>
BBFAST_INLINE void add_found(const uint8_t* __restrict x, const int16_t* __restrict whole,
                             const int16_t* __restrict extra, uint8_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = sum<D>(x[i], whole[i], extra[i]);
}

template <class T, class D>
BBFAST_INLINE bool add_run(const T* __restrict x, const D* __restrict delta, T* __restrict out, int64_t count) {
  NanCount<D> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (!std::is_same_v<T, uint8_t>) {
      const D v = load(x[i]) + delta[i];
      nans += v != v ? 1 : 0;
      const D low = v < D(0) ? D(0) : v;
      out[i] = store<T>(low > D(1) ? D(1) : low);
    } else if constexpr (std::is_same_v<D, float>) {
      nans += delta[i] != delta[i] ? 1 : 0;
      const Addend a = addend(delta[i]);
      out[i] = sum<D>(x[i], a.whole, a.extra);
    } else {
      nans += delta[i] != delta[i] ? 1 : 0;
      out[i] = finish_truncated(static_cast<D>(x[i]) + delta[i]);
    }
  }
  return nans != 0;
}

template <class D>
BBFAST_INLINE bool any_nan(const D* values, int64_t count) {
  NanCount<D> nans = 0;
  for (int64_t i = 0; i < count; ++i) nans += values[i] != values[i] ? 1 : 0;
  return nans != 0;
}

template <class T, class D>
BBFAST_CLONES bool add_pieces(const T* images, const D* delta, const int16_t* whole, const int16_t* extra,
                              const bool* where, T* out, AddShape shape, int64_t piece, int64_t begin, int64_t end) {
  const int64_t pieces = (shape.length + piece - 1) / piece;
  bool nan = false;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / pieces;
    const int64_t first = (item - n * pieces) * piece;
    const int64_t count = std::min(piece, shape.length - first);
    const int64_t at = n * shape.length + first;
    if (where != nullptr && !where[n]) {
      nan |= pass_through(images + at, out + at, count);
      if (shape.period == 0) nan |= any_nan(delta + at, count);
      continue;
    }
    // A piece is a whole period, or a period is a whole sample.
    const int64_t from = shape.period == 0 ? at : (shape.period < shape.length ? 0 : first);
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (whole != nullptr) {
        add_found<D>(images + at, whole + from, extra + from, out + at, count);
        continue;
      }
    }
    nan |= add_run(images + at, delta + from, out + at, count);
  }
  return nan;
}

}  // namespace

template <class T, class D>
bool add_cpu(const T* images, const D* delta, const bool* where, T* out, AddShape shape, ParallelFor parallel) {
  constexpr int64_t kPiece = 1 << 14;
  if (shape.samples * shape.length == 0) return false;
  const bool repeats = shape.period > 0 && shape.period < shape.length;
  const int64_t piece = repeats ? shape.period : std::min(kPiece, shape.length);
  Addends<D> addends;
  const bool found = std::is_same_v<T, uint8_t> && shape.period > 0 && (shape.samples > 1 || repeats);
  std::atomic<bool> nan = found ? addends.find(delta, shape.period) : any_nan(delta, shape.period);
  auto body = [&](int64_t begin, int64_t end) {
    if (add_pieces(images, delta, found ? addends.whole.data() : nullptr, addends.extra.data(), where, out, shape,
                   piece, begin, end)) {
      nan = true;
    }
  };
  const int64_t bytes = 2 * sizeof(T) + (found ? 0 : sizeof(D));
  for_range(parallel, shape.samples * ((shape.length + piece - 1) / piece), grain_for(piece * bytes), body);
  return nan;
}

#define BBFAST_ADD(T, D) template bool add_cpu(const T*, const D*, const bool*, T*, AddShape, ParallelFor)
BBFAST_ADD(uint8_t, float);
BBFAST_ADD(uint8_t, double);
BBFAST_ADD(Half, float);
BBFAST_ADD(BFloat16, float);
BBFAST_ADD(float, float);
BBFAST_ADD(double, double);

}  // namespace bbfast

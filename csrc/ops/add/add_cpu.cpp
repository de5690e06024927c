#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/mix.h"
#include "common/tiles.h"
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
BBFAST_CLONES bool add_tile(const T* images, const D* delta, const int16_t* whole, const int16_t* extra,
                            const bool* where, T* out, BatchShape shape, bool shared, Tile tile) {
  bool nan = false;
  for (int64_t n = tile.begin; n < tile.end; ++n) {
    const int64_t at = tile.at(n, shape);
    const D* added = shared ? delta : delta + at;
    if (where != nullptr && !where[n]) {
      nan |= pass_through(images + at, out + at, tile.count);
      if (!shared) nan |= any_nan(added, tile.count);
    } else if (whole == nullptr) {
      nan |= add_run(images + at, added, out + at, tile.count);
    } else if constexpr (std::is_same_v<T, uint8_t>) {
      add_found<D>(images + at, whole, extra, out + at, tile.count);
    }
  }
  return nan;
}

// As many whole copies of `row` as a tile takes.
template <class E>
std::vector<E> repeated(const E* row, int64_t length, int64_t times) {
  std::vector<E> tile;
  tile.reserve(length * times);
  for (int64_t i = 0; i < times; ++i) tile.insert(tile.end(), row, row + length);
  return tile;
}

}  // namespace

template <class T, class D>
bool add_cpu(const T* images, const D* delta, const bool* where, T* out, AddShape add, ParallelFor parallel) {
  if (add.samples * add.length == 0) return false;
  const bool shared = add.period > 0;
  const bool repeats = shared && add.period < add.length;
  const int64_t times = repeats ? std::max<int64_t>(1, kTileElements / add.period) : 1;
  const int64_t size = repeats ? add.period * times : kTileElements;
  const std::vector<D> tiled = repeats ? repeated(delta, add.period, times) : std::vector<D>{};
  const D* values = repeats ? tiled.data() : delta;
  Addends<D> addends;
  const bool found = std::is_same_v<T, uint8_t> && shared && (add.samples > 1 || repeats);
  std::atomic<bool> nan = found ? addends.find(values, repeats ? size : add.period) : any_nan(delta, add.period);
  const BatchShape shape{add.samples, 1, add.length};
  const int64_t bytes = 2 * sizeof(T) + (found ? 0 : sizeof(D));
  for_tiles(shape, size, repeats ? 1 : kTileSamples, bytes, parallel, [&](const Tile& tile) {
    const int64_t from = repeats || !shared ? 0 : tile.first;
    const int16_t* whole = found ? addends.whole.data() + from : nullptr;
    const int16_t* extra = found ? addends.extra.data() + from : nullptr;
    if (add_tile(images, values + from, whole, extra, where, out, shape, shared, tile)) nan = true;
  });
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

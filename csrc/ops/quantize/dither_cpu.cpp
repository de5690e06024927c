#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "common/mix.h"
#include "ops/quantize/quantize.h"

namespace bbfast {
namespace {

// A pixel waits for its left neighbour's error, so the planes go side by side: a vector holds the same pixel of kLanes
// planes, and kGroups vectors take turns at waiting.
constexpr int64_t kLanes = 16;
constexpr int64_t kGroups = 2;
constexpr int64_t kPlanes = kLanes * kGroups;
constexpr int64_t kTile = 16;  // columns that are turned from planes to lanes and back at once

// Aligned as their elements are: they lie over plain arrays of them.
template <class E>
struct LanesOf {
  using type __attribute__((vector_size(kLanes * sizeof(E)), aligned(sizeof(E)), may_alias)) = E;
};
template <class E>
using Lanes = typename LanesOf<E>::type;

template <class C>
using Bits = std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t>;

// Adding a number of this size and the same sign rounds to a whole number, halves to even; what is as large already is
// whole.
template <class C>
constexpr C kWhole = C(1) / std::numeric_limits<C>::epsilon();

template <class T, class C>
BBFAST_INLINE void nearest(Lanes<C>& value) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    value = (value + C(1.5) * kWhole<C>)-C(1.5) * kWhole<C>;  // a byte with its errors is small, whatever its sign
  } else {
    // On the bits, since comparisons of vectors this long are taken apart by the compiler.
    using I = Lanes<Bits<C>>;
    constexpr Bits<C> kSign = std::numeric_limits<Bits<C>>::min();
    constexpr Bits<C> kWholeBits = std::bit_cast<Bits<C>>(kWhole<C>);
    const I bits = reinterpret_cast<const I&>(value);
    const I shift_bits = (bits & kSign) | kWholeBits;
    const Lanes<C> shift = reinterpret_cast<const Lanes<C>&>(shift_bits);
    const Lanes<C> whole = (value + shift) - shift;
    const I small = ((bits & ~kSign) - kWholeBits) >> (8 * sizeof(C) - 1);
    const I chosen = (reinterpret_cast<const I&>(whole) & small) | (bits & ~small);
    value = reinterpret_cast<const Lanes<C>&>(chosen);
  }
}

// The planes of one round; the last is repeated where there are fewer than kPlanes.
struct Round {
  int64_t begin[kPlanes];  // where each begins
  int64_t count;
  int64_t step;  // elements between the pixels of a row
};

#if defined(__clang__)
#define BBFAST_SHUFFLE __builtin_shufflevector
#else
#define BBFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes<uint8_t>{__VA_ARGS__})
#endif

// 16 rows of 16 bytes, rows and columns exchanged: four times, halves are taken apart and put together in turns.
BBFAST_INLINE void transpose(Lanes<uint8_t>* rows) {
  for (int round = 0; round < 4; ++round) {
    Lanes<uint8_t> mixed[16];
    for (int i = 0; i < 8; ++i) {
      const Lanes<uint8_t> a = rows[i];
      const Lanes<uint8_t> b = rows[i + 8];
      mixed[2 * i] = BBFAST_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = BBFAST_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
}

// The tiles of `count` columns, from planes to lanes and back. Only bytes are worth more than moving them one by one.
template <class T>
BBFAST_INLINE void gather(const T* images, const Round& r, int64_t at, int64_t count, T* __restrict tile) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (r.step == 1 && count == kTile) {
      for (int64_t g = 0; g < kPlanes; g += kLanes) {
        Lanes<uint8_t> rows[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) std::memcpy(&rows[l], images + r.begin[g + l] + at, kTile);
        transpose(rows);
        for (int64_t j = 0; j < kTile; ++j) std::memcpy(tile + j * kPlanes + g, &rows[j], kLanes);
      }
      return;
    }
  }
  for (int64_t l = 0; l < kPlanes; ++l) {
    const T* row = images + r.begin[l] + at * r.step;
    for (int64_t j = 0; j < count; ++j) tile[j * kPlanes + l] = row[j * r.step];
  }
}

template <class T>
BBFAST_INLINE void scatter(const T* __restrict tile, const Round& r, int64_t at, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (r.step == 1 && count == kTile) {
      for (int64_t g = 0; g < r.count; g += kLanes) {
        Lanes<uint8_t> rows[kLanes];
        for (int64_t j = 0; j < kTile; ++j) std::memcpy(&rows[j], tile + j * kPlanes + g, kLanes);
        transpose(rows);
        const int64_t used = std::min(kLanes, r.count - g);
        for (int64_t l = 0; l < used; ++l) std::memcpy(out + r.begin[g + l] + at, &rows[l], kTile);
      }
      return;
    }
  }
  for (int64_t l = 0; l < r.count; ++l) {
    T* row = out + r.begin[l] + at * r.step;
    for (int64_t j = 0; j < count; ++j) row[j * r.step] = tile[j * kPlanes + l];
  }
}

template <class T, class C>
BBFAST_INLINE void to_numbers(const T* __restrict tile, int64_t count, C* __restrict numbers) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = load(tile[i]);
}

template <class T, class C>
BBFAST_INLINE void from_numbers(const C* __restrict numbers, int64_t count, bool truncate, T* __restrict tile) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (truncate) {
      for (int64_t i = 0; i < count; ++i) tile[i] = finish_truncated(numbers[i]);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) tile[i] = finish<T>(numbers[i]);
}

// `errors` holds kPlanes values for each pixel of a row and for one more at each end; all zero at first. Returns
// whether a result is not finite.
template <class T, class C>
BBFAST_CLONES bool dither_round(const T* images, T* out, const Round& r, int64_t height, int64_t width, Levels levels,
                                C* errors) {
  using V = Lanes<C>;
  const C top = std::is_same_v<T, uint8_t> ? C(255) : C(1);
  const C steps = static_cast<C>(levels.steps);
  const C scale = static_cast<C>(static_cast<double>(levels.steps) / static_cast<double>(top));
  T tile[kTile * kPlanes];
  C numbers[kTile * kPlanes];
  V odd[kGroups] = {};
  for (int64_t y = 0; y < height; ++y) {
    V left[kGroups] = {};
    V above_left[kGroups] = {};
    V above[kGroups];
    V* row = reinterpret_cast<V*>(errors) + kGroups;
    for (int64_t g = 0; g < kGroups; ++g) above[g] = row[g];
    for (int64_t first = 0; first < width; first += kTile) {
      const int64_t count = std::min(kTile, width - first);
      gather(images, r, y * width + first, count, tile);
      to_numbers(tile, count * kPlanes, numbers);
      V* pixel = reinterpret_cast<V*>(numbers);
      for (int64_t j = 0; j < count; ++j, pixel += kGroups, row += kGroups) {
        for (int64_t g = 0; g < kGroups; ++g) {
          const V above_right = row[kGroups + g];
          V v = pixel[g] + above_left[g] * C(0.0625);
          v = v + above[g] * C(0.3125);
          v = v + above_right * C(0.1875);
          v = v + left[g] * C(0.4375);
          V level = v * scale;
          nearest<T, C>(level);
          level = level * top / steps;
          left[g] = v - level;
          above_left[g] = above[g];
          above[g] = above_right;
          row[g] = left[g];
          pixel[g] = level;
          if constexpr (!std::is_same_v<T, uint8_t>) odd[g] += level - level;  // zero, or NaN for ever
        }
      }
      from_numbers(numbers, count * kPlanes, levels.truncate, tile);
      scatter(tile, r, y * width + first, count, out);
    }
  }
  bool found = false;
  for (int64_t l = 0; l < r.count; ++l) found |= odd[l / kLanes][l % kLanes] != C(0);
  return found;
}

}  // namespace

template <class T>
bool dither_cpu(const T* images, const bool* where, T* out, PlaneShape shape, Levels levels, ParallelFor parallel) {
  using C = Compute<T>;
  const int64_t pixels = shape.height * shape.width;
  const int64_t length = shape.channels * pixels;
  std::vector<int64_t> chosen;
  for (int64_t n = 0; n < shape.samples; ++n) {
    if (where == nullptr || where[n]) chosen.push_back(n);
  }
  std::atomic<bool> found = false;
  auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (!where[n] && pass_through(images + n * length, out + n * length, length)) found = true;
    }
  };
  if (where != nullptr) for_range(parallel, shape.samples, grain_for(length * 2 * sizeof(T)), copy);
  const int64_t planes = static_cast<int64_t>(chosen.size()) * shape.channels;
  auto rounds = [&](int64_t begin, int64_t end) {
    std::vector<C> errors((shape.width + 2) * kPlanes);
    for (int64_t i = begin; i < end; ++i) {
      Round r;
      r.count = std::min(kPlanes, planes - i * kPlanes);
      r.step = shape.last ? shape.channels : 1;
      for (int64_t l = 0; l < kPlanes; ++l) {
        const int64_t plane = i * kPlanes + std::min(l, r.count - 1);
        const int64_t channel = plane % shape.channels;
        r.begin[l] = chosen[plane / shape.channels] * length + channel * (shape.last ? 1 : pixels);
      }
      std::fill(errors.begin(), errors.end(), C(0));
      if (dither_round(images, out, r, shape.height, shape.width, levels, errors.data())) found = true;
    }
  };
  if (pixels > 0) for_range(parallel, (planes + kPlanes - 1) / kPlanes, grain_for(kPlanes * pixels), rounds);
  return found;
}

#define BBFAST_DITHER(T) template bool dither_cpu(const T*, const bool*, T*, PlaneShape, Levels, ParallelFor)
BBFAST_DITHER(uint8_t);
BBFAST_DITHER(Half);
BBFAST_DITHER(BFloat16);
BBFAST_DITHER(float);
BBFAST_DITHER(double);

}  // namespace bbfast

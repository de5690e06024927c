#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>

#include "common/mix.h"
#include "ops/quantize/affine.h"
#include "ops/quantize/byte_table.h"
#include "ops/quantize/quantize.h"

namespace bbfast {
namespace {

BBFAST_INLINE void quantize_bytes(const uint8_t* __restrict x, uint8_t* __restrict out, int64_t count, ByteLevels l) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t step =
        static_cast<uint16_t>(static_cast<uint16_t>(x[i] * l.step.factor + l.step.offset) >> l.step.shift);
    out[i] = static_cast<uint8_t>(static_cast<uint16_t>(step * l.level.factor + l.level.offset) >> l.level.shift);
  }
}

// For the numbers of levels that have no integer form. Halves come out exact, so they are rounded as they should be.
BBFAST_INLINE void quantize_bytes(const uint8_t* __restrict x, uint8_t* __restrict out, int64_t count, Levels levels) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, halves to even
  const float steps = static_cast<float>(levels.steps);
  const float scale = static_cast<float>(levels.steps / 255.0);
  if (levels.truncate) {
    for (int64_t i = 0; i < count; ++i) {
      const float step = (load(x[i]) * scale + kShift) - kShift;
      out[i] = static_cast<uint8_t>(static_cast<int32_t>(step * 255.0f / steps));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float step = (load(x[i]) * scale + kShift) - kShift;
    out[i] = finish<uint8_t>(step * 255.0f / steps);
  }
}

BBFAST_INLINE float nearest(float value) {
  return __builtin_rintf(value);
}
BBFAST_INLINE double nearest(double value) {
  return __builtin_rint(value);
}

template <class T>
BBFAST_INLINE bool quantize_floats(const T* __restrict x, T* __restrict out, int64_t count, Levels levels) {
  using C = Compute<T>;
  const C steps = static_cast<C>(levels.steps);
  NanCount<C> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const C v = nearest(load(x[i]) * steps) / steps;
    nans += v != v ? 1 : 0;
    out[i] = store<T>(v);
  }
  return nans != 0;
}

// How bytes are quantized: by a table where that is fast, else by whole numbers where these can do it, else by floats.
struct ByteRule {
  bool by_table;
  ByteTable table;
  ByteLevels levels;

  explicit ByteRule(Levels given) : by_table(has_fast_byte_table()) {
    if (by_table) {
      ByteTable bytes;
      std::iota(bytes.begin(), bytes.end(), uint8_t{0});
      quantize_bytes(bytes.data(), table.data(), 256, given);
    } else {
      levels = find_byte_levels(given.steps, given.truncate);
    }
  }
};

constexpr int64_t kPiece = 1 << 14;

template <class T>
BBFAST_CLONES bool quantize_pieces(const T* images, const bool* where, T* out, int64_t length, Levels levels,
                                   const ByteRule* bytes, int64_t begin, int64_t end) {
  const int64_t pieces = (length + kPiece - 1) / kPiece;
  bool nan = false;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / pieces;
    const int64_t first = (item - n * pieces) * kPiece;
    const int64_t count = std::min(kPiece, length - first);
    const T* x = images + n * length + first;
    T* y = out + n * length + first;
    if (where != nullptr && !where[n]) {
      nan |= pass_through(x, y, count);
    } else if constexpr (!std::is_same_v<T, uint8_t>) {
      nan |= quantize_floats(x, y, count, levels);
    } else if (bytes->by_table) {
      look_up_bytes(bytes->table, x, y, count);
    } else if (bytes->levels.found()) {
      quantize_bytes(x, y, count, bytes->levels);
    } else {
      quantize_bytes(x, y, count, levels);
    }
  }
  return nan;
}

}  // namespace

template <class T>
bool quantize_cpu(const T* images, const bool* where, T* out, int64_t samples, int64_t length, Levels levels,
                  ParallelFor parallel) {
  std::atomic<bool> nan = false;
  std::optional<ByteRule> bytes;
  if constexpr (std::is_same_v<T, uint8_t>) bytes.emplace(levels);
  auto body = [&](int64_t begin, int64_t end) {
    if (quantize_pieces(images, where, out, length, levels, bytes ? &*bytes : nullptr, begin, end)) nan = true;
  };
  const int64_t items = samples * ((length + kPiece - 1) / kPiece);
  for_range(parallel, items, grain_for(std::min(kPiece, length) * 2 * sizeof(T)), body);
  return nan;
}

#define BBFAST_QUANTIZE(T) template bool quantize_cpu(const T*, const bool*, T*, int64_t, int64_t, Levels, ParallelFor)
BBFAST_QUANTIZE(uint8_t);
BBFAST_QUANTIZE(Half);
BBFAST_QUANTIZE(BFloat16);
BBFAST_QUANTIZE(float);
BBFAST_QUANTIZE(double);

}  // namespace bbfast

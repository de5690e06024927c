// Sums from which the CPU kernel of channel_stats makes its statistics.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/scalar.h"
#include "common/simd.h"

namespace bbfast::stats {

// Eight doubles that the compiler keeps in one, two or four registers, as the processor has them.
using Wide = double __attribute__((vector_size(64)));
using WideFloat = float __attribute__((vector_size(32)));
constexpr int64_t kWide = 8;

BBFAST_INLINE void read(const float* from, Wide& to) {
  WideFloat values;
  std::memcpy(&values, from, sizeof(values));
  to = __builtin_convertvector(values, Wide);
}
BBFAST_INLINE void read(const double* from, Wide& to) {
  std::memcpy(&to, from, sizeof(to));
}
template <class T>
BBFAST_INLINE void read(const T* from, Wide& to) {
  float values[kWide];
  for (int64_t l = 0; l < kWide; ++l) values[l] = load(from[l]);
  read(values, to);
}

// Sums of values minus one of them (`shift`), from which the variance comes without cancellation: the shift lies no
// farther from the mean than a value can.
struct WideSums {
  Wide shift, delta, square, absolute, low, high;

  // NaN and infinity as shift would make NaN of all that follows.
  BBFAST_INLINE void start(const Wide& first) {
    const Wide zero = {};
    shift = first - first == zero ? first : zero;
    delta = square = absolute = zero;
    low = zero + std::numeric_limits<double>::infinity();
    high = zero - std::numeric_limits<double>::infinity();
  }

  BBFAST_INLINE void add(const Wide& v) {
    const Wide zero = {};
    const Wide d = v - shift;
    delta += d;
    square += d * d;
    absolute += v < zero ? -v : v;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
};

struct Sums {
  double shift, delta, square, absolute, low, high;

  void add(double v) {
    const double d = v - shift;
    delta += d;
    square += d * d;
    absolute += v < 0 ? -v : v;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
};

// Statistics of some values of one channel. `scatter` is the sum of squared distances from the mean.
struct Part {
  double mean = 0;
  double scatter = 0;
  double absolute = 0;
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  Part() = default;
  Part(const Sums& s, double count)
      : mean(s.shift + s.delta / count), scatter(s.square - s.delta * (s.delta / count)), absolute(s.absolute) {
    if (scatter < 0) scatter = 0;
    // Comparisons pass NaN by; the sum of absolute values does not, and no infinities cancel in it.
    const bool nan = absolute != absolute;
    low = nan ? absolute : s.low;
    high = nan ? absolute : s.high;
  }

  // Chan, Golub and LeVeque (1983), eq. 1.5; the mean by plain sums, where infinities stay what they are.
  void join(double count, const Part& other, double other_count) {
    if (other_count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other_count;
    const double apart = other.mean - mean;
    scatter += other.scatter + apart * apart * (count * (other_count / total));
    mean = (mean * count + other.mean * other_count) / total;
    absolute += other.absolute;
    low = other.low < low || other.low != other.low ? other.low : low;
    high = other.high > high || other.high != other.high ? other.high : high;
  }
};

}  // namespace bbfast::stats

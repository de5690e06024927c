#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/scalar.h"
#include "common/simd.h"
#include "ops/gram_powers/gram_powers.h"
#include "ops/gram_powers/root.h"

namespace bbfast {
namespace {

// As many numbers as 64 bytes hold; the compiler keeps them in one, two or four registers, as the processor has them.
template <class C>
struct Vector {
  using type __attribute__((vector_size(64), may_alias)) = C;
};
template <class C>
using Wide = typename Vector<C>::type;
template <class C>
constexpr int64_t kWide = 64 / sizeof(C);
template <class C>
constexpr int64_t kPanel = 2 * kWide<C>;  // columns whose sums stay in registers, for kStrip rows
constexpr int64_t kStrip = 4;

template <class C>
BBFAST_INLINE const Wide<C>& wide(const C* at) {
  return *reinterpret_cast<const Wide<C>*>(at);
}

// What a thread works in. Channels are neighbours here, and padded with zeros to whole panels.
template <class C>
struct Workspace {
  int64_t padded;
  std::vector<C> memory;
  C* values;  // [positions, padded] of one sample
  C* powers;  // [positions, padded]
  std::vector<C> factor;
  std::vector<int32_t> peak;   // exponent of the largest magnitude of each channel
  std::vector<int32_t> shift;  // bits by which it is shifted for an order

  explicit Workspace(const GramShape& s)
      : padded((s.channels + kPanel<C> - 1) / kPanel<C> * kPanel<C>),
        memory(2 * padded * s.positions() + kWide<C>),
        factor(padded, C(1)),
        peak(padded, 0),
        shift(padded, 0) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    values = memory.data() + (64 - address % 64) % 64 / sizeof(C);
    powers = values + padded * s.positions();
  }
};

template <class T, class C>
BBFAST_CLONES void read_sample(const T* x, const GramShape& s, Workspace<C>& w) {
  std::fill(w.values, w.values + w.padded * s.positions(), C(0));
  for (int64_t c = 0; c < s.channels; ++c) {
    C top = 0;
    C* to = w.values + c;
    for (int64_t i = 0; i < s.height; ++i) {
      const T* from = x + c * s.channel_step + i * s.row_step;
      for (int64_t j = 0; j < s.width; ++j, to += w.padded) {
        const C v = load(from[j * s.column_step]);
        const C magnitude = v < 0 ? -v : v;
        top = magnitude > top ? magnitude : top;
        *to = v;
      }
    }
    int exponent = 0;
    if (top <= std::numeric_limits<C>::max()) std::frexp(top, &exponent);
    w.peak[c] = exponent;
  }
}

// Shifts every channel towards a common peak, which is exact, and raises it to a power.
template <class C>
BBFAST_CLONES void raise(const GramShape& s, int64_t order, Workspace<C>& w) {
  constexpr int32_t kTop = std::numeric_limits<C>::max_exponent - 1;
  const auto bits = static_cast<int32_t>(gram_peak_bits(order, s.positions(), s.compat, kTop));
  for (int64_t c = 0; c < s.channels; ++c) {
    w.shift[c] = std::min(bits - w.peak[c], kTop - 1);
    w.factor[c] = std::ldexp(C(1), w.shift[c]);
  }
  const int64_t power = s.compat ? 1 : order;
  const C* factor = w.factor.data();
  for (int64_t i = 0; i < s.positions(); ++i) {
    const C* __restrict from = w.values + i * w.padded;
    C* __restrict to = w.powers + i * w.padded;
    for (int64_t c = 0; c < w.padded; ++c) {
      const C v = from[c] * factor[c];
      C result = v;
      for (int64_t p = 1; p < power; ++p) result *= v;
      to[c] = result;
    }
  }
}

// sums[i][j] = sum over positions of powers[., top + i] * powers[., left + j], position by position.
template <class C>
BBFAST_INLINE void multiply(const C* powers, int64_t positions, int64_t padded, int64_t top, int64_t left,
                            C (*sums)[kPanel<C>]) {
  Wide<C> strip[kStrip][2] = {};
  const C* a = powers + top;
  const C* b = powers + left;
  for (int64_t s = 0; s < positions; ++s, a += padded, b += padded) {
    const Wide<C> first = wide(b);
    const Wide<C> second = wide(b + kWide<C>);
    for (int64_t i = 0; i < kStrip; ++i) {
      strip[i][0] += a[i] * first;
      strip[i][1] += a[i] * second;
    }
  }
  for (int64_t i = 0; i < kStrip; ++i) {
    for (int64_t j = 0; j < kWide<C>; ++j) {
      sums[i][j] = strip[i][0][j];
      sums[i][j + kWide<C>] = strip[i][1][j];
    }
  }
}

template <class T, class C>
BBFAST_CLONES void gram_matrix(const GramShape& s, int64_t order, const Workspace<C>& w, T* out) {
  constexpr int64_t kColumns = kPanel<C>;
  // Without compat a shift of the channels is one of the result, order times under the root.
  const auto weight = static_cast<int32_t>(s.compat ? 1 : order);
  alignas(64) C sums[kStrip][kColumns];
  alignas(64) int32_t shift[kColumns];
  for (int64_t left = 0; left < s.channels; left += kColumns) {
    const int64_t right = std::min(left + kColumns, s.channels);
    for (int64_t top = 0; top < right; top += kStrip) {
      multiply(w.powers, s.positions(), w.padded, top, left, sums);
      for (int64_t i = top; i < std::min(top + kStrip, right); ++i) {
        C* own = sums[i - top];
        for (int64_t j = 0; j < kColumns; ++j) shift[j] = weight * (w.shift[i] + w.shift[left + j]);
        if (order == 1) {
          gram::shift_back<kColumns>(own, shift);
        } else {
          gram::signed_roots<kColumns>(own, shift, order);
        }
        T* row = out + i * s.channels - i * (i - 1) / 2 - i;  // entry (i, j) of the triangle is row[j]
        for (int64_t j = std::max(i, left); j < right; ++j) row[j] = store<T>(own[j - left]);
      }
    }
  }
}

}  // namespace

template <class T>
void gram_powers_cpu(const T* features, const int64_t* orders, T* out, GramShape shape, ParallelFor parallel) {
  using C = Compute<T>;
  auto body = [&](int64_t begin, int64_t end) {
    Workspace<C> workspace(shape);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / shape.orders;
      if (item == begin || item % shape.orders == 0) read_sample(features + n * shape.sample_step, shape, workspace);
      const int64_t order = orders[item % shape.orders];
      raise(shape, order, workspace);
      gram_matrix(shape, order, workspace, out + item * shape.entries());
    }
  };
  for_range(parallel, shape.samples * shape.orders, 1, body);
}

#define BBFAST_GRAM(T) template void gram_powers_cpu(const T*, const int64_t*, T*, GramShape, ParallelFor)
BBFAST_GRAM(float);
BBFAST_GRAM(double);
BBFAST_GRAM(Half);
BBFAST_GRAM(BFloat16);

}  // namespace bbfast

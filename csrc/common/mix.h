// Inner loops of operations that mix a second image into a batch. Each returns whether a result is NaN.
//
// The formula is x * (1 - a) + p * a with every operation rounded on its own (this project is compiled without
// contraction), so the CPU, CUDA and the PyTorch reference agree bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/scalar.h"
#include "common/simd.h"

namespace bbfast {

// Counter as wide as the compute type, so that the loop keeps one vector width.
template <class C>
using NanCount = std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t>;

// To the images' type. For uint8: clamp, then round half to even; adding 1.5 * 2^23 makes the float unit do that, and
// leaves the integer in the low bits. The comparisons are written so that NaN becomes 0.
template <class T>
BBFAST_INLINE T finish(Compute<T> value) {
  return store<T>(value);
}

template <>
BBFAST_INLINE uint8_t finish<uint8_t>(float value) {
  const float low = value > 0.0f ? value : 0.0f;
  const float clamped = low < 255.0f ? low : 255.0f;
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(clamped + 12582912.0f));
}

// What a cast does: clamp, then cut the fraction off.
template <class C>
BBFAST_INLINE uint8_t finish_truncated(C value) {
  const C low = value > C(0) ? value : C(0);
  const C clamped = low < C(255) ? low : C(255);
  return static_cast<uint8_t>(static_cast<int32_t>(clamped));
}

template <class T, class P>
BBFAST_INLINE bool mix_map(const T* __restrict x, const P* __restrict p, const Compute<T>* __restrict a,
                           T* __restrict out, int64_t count) {
  using C = Compute<T>;
  NanCount<C> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const C v = load(x[i]) * (C(1) - a[i]) + load(p[i]) * a[i];
    nans += v != v ? 1 : 0;
    out[i] = finish<T>(v);
  }
  return nans != 0;
}

template <class T, class P>
BBFAST_INLINE bool mix_constant(const T* __restrict x, const P* __restrict p, Compute<T> a, T* __restrict out,
                                int64_t count) {
  using C = Compute<T>;
  const C rest = C(1) - a;
  NanCount<C> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const C v = load(x[i]) * rest + load(p[i]) * a;
    nans += v != v ? 1 : 0;
    out[i] = finish<T>(v);
  }
  return nans != 0;
}

// A sample that stays as it is.
template <class T>
BBFAST_INLINE bool pass_through(const T* __restrict x, T* __restrict out, int64_t count) {
  std::copy_n(x, count, out);  // not memcpy: a batch of empty images has null pointers
  if constexpr (std::is_same_v<T, uint8_t>) {
    return false;
  } else {
    using C = Compute<T>;
    NanCount<C> nans = 0;
    for (int64_t i = 0; i < count; ++i) {
      const C v = load(x[i]);
      nans += v != v ? 1 : 0;
    }
    return nans != 0;
  }
}

}  // namespace bbfast

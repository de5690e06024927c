// p-th roots of sums for the CPU kernel of gram_powers.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace bbfast::gram {

BBFAST_INLINE float power_of_two(int32_t exponent) {  // -126..127
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// Replaces sums[l] by sign(x) |x 2^-shift[l]|^(1/order). The exponent is divided apart from the mantissa, so that the
// logarithm that is divided stays small and the error within a few units in the last place. No arithmetic stands under
// a condition, or the compiler would not vectorise it.
template <int64_t kCount>
BBFAST_INLINE void signed_roots(float* __restrict sums, const int32_t* __restrict shift, int64_t order) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float whole = static_cast<float>(order);
  const float part = 1.0f / whole;
  for (int64_t l = 0; l < kCount; ++l) {
    const float x = sums[l];
    const uint32_t sign = std::bit_cast<uint32_t>(x) & 0x80000000u;
    const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ sign);
    const uint32_t subnormal = ((std::bit_cast<uint32_t>(x) ^ sign) - 0x00800000u) >> 31;
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude * std::bit_cast<float>((127u + 32u * subnormal) << 23));
    const uint32_t fraction = bits & 0x007FFFFFu;
    const uint32_t upper = (0x003504F3u - fraction) >> 31;  // mantissa above the root of two: halved, into 0.71..1.42
    const float mantissa = std::bit_cast<float>(fraction | ((127u - upper) << 23));
    const int32_t exponent = static_cast<int32_t>((bits >> 23) + upper - 127u - 32u * subnormal) - shift[l];
    const float e = static_cast<float>(exponent);
    // Rounded down: one half less is rounded to the nearest; no tie can come up.
    const float quotient = ((e + 0.5f) * part - 0.5f + kToInteger) - kToInteger;
    const float rest = e - quotient * whole;

    const float m = mantissa - 1.0f;
    const float m2 = m * m;
    const float m4 = m2 * m2;
    // Cephes' logarithm, its terms in pairs: a chain of them would leave the processor waiting.
    const float low = (3.3333331174e-1f - 2.4999993993e-1f * m) + (2.0000714765e-1f - 1.6668057665e-1f * m) * m2;
    const float high = (1.4249322787e-1f - 1.2420140846e-1f * m) + (1.1676998740e-1f - 1.1514610310e-1f * m) * m2;
    const float p = (low + high * m4) + 7.0376836292e-2f * (m4 * m4);
    const float logarithm = (p * (m2 * m) + (m - 0.5f * m2)) * 1.44269504f;

    const float t = (rest + logarithm) * part;  // -0.5..1
    const float up = (t + kToInteger) - kToInteger;
    const float f = t - up;
    const float f2 = f * f;
    const float q = (6.931472028550421e-1f + 2.402264791363012e-1f * f) +
                    ((5.550332471162809e-2f + 9.618437357674640e-3f * f) +
                     (1.339887440266574e-3f + 1.535336188319500e-4f * f) * f2) *
                        f2;
    const float root = q * f + 1.0f;

    const auto whole_bits = static_cast<int32_t>(quotient + up);
    const int32_t least = whole_bits < -250 ? -250 : whole_bits;
    const int32_t scale = least > 250 ? 250 : least;
    const int32_t half = scale >> 1;
    const uint32_t y = std::bit_cast<uint32_t>(root * power_of_two(half) * power_of_two(scale - half));
    // All ones for numbers; zero for zero, infinity and NaN, which stay.
    const uint32_t number = 0u - static_cast<uint32_t>(std::bit_cast<uint32_t>(magnitude) - 1u < 0x7F7FFFFFu);
    const uint32_t result = (y & number) | (std::bit_cast<uint32_t>(magnitude) & ~number);
    sums[l] = std::bit_cast<float>(result | sign);
  }
}

// Order 1 has nothing but the shift, -254..252, to be undone; in two halves, for either may be no float on its own.
template <int64_t kCount>
BBFAST_INLINE void shift_back(float* __restrict sums, const int32_t* __restrict shift) {
  for (int64_t l = 0; l < kCount; ++l) {
    const int32_t half = shift[l] >> 1;
    sums[l] = sums[l] * power_of_two(-half) * power_of_two(half - shift[l]);
  }
}

template <int64_t kCount>
inline void shift_back(double* sums, const int32_t* shift) {
  for (int64_t l = 0; l < kCount; ++l) sums[l] = std::ldexp(sums[l], -shift[l]);
}

template <int64_t kCount>
inline void signed_roots(double* sums, const int32_t* shift, int64_t order) {
  for (int64_t l = 0; l < kCount; ++l) {
    const double magnitude = std::fabs(sums[l]);
    if (!(magnitude > 0) || std::isinf(magnitude)) continue;
    int exponent = 0;
    const double mantissa = std::frexp(magnitude, &exponent);
    exponent -= shift[l];
    const int quotient = static_cast<int>(std::floor(static_cast<double>(exponent) / static_cast<double>(order)));
    const int rest = exponent - quotient * static_cast<int>(order);
    const double root = std::pow(std::ldexp(mantissa, rest), 1.0 / static_cast<double>(order));
    sums[l] = std::copysign(std::ldexp(root, quotient), sums[l]);
  }
}

}  // namespace bbfast::gram

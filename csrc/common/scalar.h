// Element types of kernels: double, float and the two 16-bit formats, which are stored as bits and computed in float.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace bbfast {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type in which a kernel computes with elements of type T.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

BBFAST_INLINE float load(float value) {
  return value;
}
BBFAST_INLINE double load(double value) {
  return value;
}
BBFAST_INLINE float load(uint8_t value) {
  return static_cast<float>(value);
}
BBFAST_INLINE float load(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// IEEE half to float without a table or a branch that depends on the value in memory order: subnormals come out through
// an exact subtraction, everything else through a rescaling by a power of two.
BBFAST_INLINE float load(Half value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t sign = wide & 0x80000000u;
  const uint32_t twice = wide + wide;
  const float normal = std::bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = std::bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = std::bit_cast<uint32_t>(twice < (1u << 27) ? subnormal : normal);
  return std::bit_cast<float>(sign | magnitude);
}

template <class T>
BBFAST_INLINE T store(Compute<T> value) {
  return value;
}

template <>
BBFAST_INLINE BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
}

// Float to IEEE half, rounding half to even: scaling up and down makes the float unit do the rounding.
template <>
BBFAST_INLINE Half store<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t twice = bits + bits;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float absolute = std::bit_cast<float>(bits & 0x7FFFFFFFu);
  const float base = std::bit_cast<float>((bias >> 1) + 0x07800000u) + absolute * 0x1.0p+112f * 0x1.0p-110f;
  const uint32_t sum = std::bit_cast<uint32_t>(base);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return Half{static_cast<uint16_t>(sign | (twice > 0xFF000000u ? 0x7E00u : magnitude))};
}

}  // namespace bbfast

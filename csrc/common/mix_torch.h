// The part that the torch layers of mixing operations share: which element types meet, and what a NaN is blamed on.
#pragma once

#include "common/image_batch.h"

namespace bbfast {

// Calls `body(T{}, P{}, C{})`: the images' type, the pattern's (the same, or the compute type) and the compute type.
template <class F>
void dispatch_mix(const char* op, const Tensor& images, const Tensor& pattern, F&& body) {
  const ScalarType compute = compute_type(images.scalar_type());
  const bool same = pattern.scalar_type() == images.scalar_type();
  BBFAST_CHECK_VALUE(same || pattern.scalar_type() == compute, op, ": pattern must be ",
                     torch::headeronly::toString(images.scalar_type()), " or ", torch::headeronly::toString(compute),
                     ", got ", torch::headeronly::toString(pattern.scalar_type()));
  switch (images.scalar_type()) {
    case ScalarType::Byte:
      return same ? body(uint8_t{}, uint8_t{}, float{}) : body(uint8_t{}, float{}, float{});
    case ScalarType::Half:
      return same ? body(Half{}, Half{}, float{}) : body(Half{}, float{}, float{});
    case ScalarType::BFloat16:
      return same ? body(BFloat16{}, BFloat16{}, float{}) : body(BFloat16{}, float{}, float{});
    case ScalarType::Float:
      return body(float{}, float{}, float{});
    case ScalarType::Double:
      return body(double{}, double{}, double{});
    default:
      BBFAST_CHECK_VALUE(false, op, ": images must be uint8 or floating, got ",
                         torch::headeronly::toString(images.scalar_type()));
  }
}

// Says which of two tensors holds the NaN that a kernel met; nothing if neither does (infinity times zero).
template <class T, class P>
void blame_nan(const char* op, const Tensor& images, const Tensor& pattern) {
  BBFAST_CHECK_VALUE(!has_nan<T>(images), op, ": images must not contain NaN");
  BBFAST_CHECK_VALUE(!has_nan<P>(pattern), op, ": pattern must not contain NaN");
}

// Piece by piece, so that the inner loop has no exit; the culprit is looked for only once there is one.
template <class C>
void check_unit_range(const char* op, const char* name, const Tensor& dense) {
  constexpr int64_t kPiece = 1024;
  const C* values = data<C>(dense);
  const int64_t count = dense.numel();
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = begin + kPiece < count ? begin + kPiece : count;
    int32_t outside = 0;
    for (int64_t i = begin; i < end; ++i) outside += !(values[i] >= C(0) && values[i] <= C(1)) ? 1 : 0;
    for (int64_t i = begin; outside != 0 && i < end; ++i) {
      BBFAST_CHECK_VALUE(values[i] >= C(0) && values[i] <= C(1), op, ": ", name, " must lie in 0..1, got ", values[i]);
    }
  }
}

}  // namespace bbfast

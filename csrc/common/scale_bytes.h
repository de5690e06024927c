// The inner loop of operations that mix something into bytes.
#pragma once

#include <cstdint>

namespace bbfast {

// What keeps a sum that is clamped to a byte within the integers.
constexpr float kMostShift = 0x1p30f;

// out[i] = x[i] * scale[i] + shift[i], each operation rounded to float, then to the nearest byte: halves to even,
// clamped to 0..255, NaN to 0. scale lies in 0..1; shift is at most kMostShift, or NaN.
void scale_bytes(const uint8_t* x, const float* scale, const float* shift, uint8_t* out, int64_t count);

}  // namespace bbfast

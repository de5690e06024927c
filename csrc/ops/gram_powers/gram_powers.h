// Upper triangles of G_p = sign(.) |F^p (F^p)^T|^(1/p) for some orders p, sample by sample.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

constexpr int64_t kGramMaxOrder = 32;  // beyond, channels scaled by powers of two no longer fit a float's range

struct GramShape {
  int64_t samples, channels, height, width;
  int64_t sample_step, channel_step, row_step, column_step;  // elements between neighbours in memory
  int64_t orders;
  bool compat;  // leave out the power before the product, as BackdoorBench does

  int64_t positions() const { return height * width; }
  int64_t entries() const { return channels * (channels + 1) / 2; }
};

// Bits by which a channel whose largest magnitude is 2^a is shifted, so that neither its p-th power nor the product of
// two of them leaves the range of numbers with exponents up to `top`, and as little as possible vanishes at its lower
// end.
inline int64_t gram_peak_bits(int64_t order, int64_t positions, bool compat, int64_t top) {
  int64_t sum_bits = 0;
  while ((int64_t{1} << sum_bits) < positions) ++sum_bits;
  return (top - 2 - sum_bits) / 2 / (compat ? 1 : order);
}

// T: float, double, 16-bit floats; computed in float or double. Orders are in 1..kGramMaxOrder.
template <class T>
void gram_powers_cpu(const T* features,
                     const int64_t* orders,  // [orders]
                     T* out,                 // [samples, orders, entries], rows of the triangle one after the other
                     GramShape shape, ParallelFor parallel);

// As above, with the orders in host memory. One launch for the channels' scales and one for each order.
template <class T>
void gram_powers_cuda(const T* features, const int64_t* orders, T* out,
                      int32_t* exponents,  // scratch [samples, channels]
                      GramShape shape, CudaStream stream);

}  // namespace bbfast

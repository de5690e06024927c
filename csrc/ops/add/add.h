// out = images + delta, clamped to 0..255 (uint8) or 0..1, for the samples in `where`; the others are copied.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct AddShape {
  int64_t samples;
  int64_t length;  // elements of a sample
  int64_t period;  // elements after which delta begins anew within a sample; 0: delta is as long as the whole batch
};

// Types (T, D): (uint8, float) rounds the exact sum half to even; (uint8, double) adds in double and cuts the fraction
// off; 16-bit floats and float with D = float, double with D = double. Returns whether delta or a float image is NaN.
template <class T, class D>
bool add_cpu(const T* images,    // [samples, length]
             const D* delta,     // [period] or [samples, length]
             const bool* where,  // [samples] or null
             T* out,             // [samples, length]
             AddShape shape, ParallelFor parallel);

template <class T, class D>
void add_cuda(const T* images, const D* delta, const bool* where, T* out, AddShape shape, CudaStream stream);

}  // namespace bbfast

// out = images * (1 - mask) + pattern * mask, for the samples in `where`; the others are copied.
#pragma once

#include <type_traits>

#include "common/batch_shape.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

// Image types T: uint8, 16-bit floats, float, double; the pattern is of type T or C, the mask of type C, with C float
// (double for double images). Returns whether any result is NaN, or any float image that was passed through.
template <class T, class P, class C>
bool patch_cpu(const T* images,    // [samples, planes, length]
               const P* pattern,   // [1 | samples, planes, length]
               const C* mask,      // [1 | samples, 1 | planes, length], 0..1
               const bool* where,  // [samples] or null
               T* out,             // [samples, planes, length]
               BatchShape shape, CompanionStride pattern_stride, CompanionStride mask_stride, ParallelFor parallel);

template <class T, class P, class C>
void patch_cuda(const T* images, const P* pattern, const C* mask, const bool* where, T* out, BatchShape shape,
                CompanionStride pattern_stride, CompanionStride mask_stride, CudaStream stream);

}  // namespace bbfast

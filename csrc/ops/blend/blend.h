// out = (1 - alpha) * images + alpha * pattern, for the samples in `where`; the others are copied.
#pragma once

#include "common/batch_shape.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

// Weight of the pattern: one number for all, one a sample, or one an element of a plane.
template <class A>
struct Alpha {
  A number;
  const A* samples;   // [samples] or null
  const A* elements;  // [length] or null
};

// Types as in patch.h. uint8 images with A = double: the arithmetic of BackdoorBench, (1 - alpha) * x in double, alpha
// * p in float, their sum in double, clamped and truncated; with A = float the common formula, rounded half to even.
// Returns whether any result is NaN, or any float image that was passed through.
template <class T, class P, class A>
bool blend_cpu(const T* images,    // [samples, planes, length]
               const P* pattern,   // [1 | samples, planes, length]
               Alpha<A> alpha,     // 0..1
               const bool* where,  // [samples] or null
               T* out,             // [samples, planes, length]
               BatchShape shape, CompanionStride pattern_stride, ParallelFor parallel);

template <class T, class P, class A>
void blend_cuda(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out, BatchShape shape,
                CompanionStride pattern_stride, CudaStream stream);

}  // namespace bbfast

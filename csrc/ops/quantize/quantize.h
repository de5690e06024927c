// The nearest of `steps + 1` even levels between 0 and the images' top (255 or 1), with or without Floyd-Steinberg
// error diffusion, for the samples in `where`; the others are copied.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct Levels {
  int64_t steps;  // 1..255, one less than there are levels
  bool truncate;  // uint8 images only: cut the fraction of a level off instead of rounding half to even
};

struct PlaneShape {
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool last;  // order of images and out: [samples, height, width, channels] instead of [samples, channels, ...]
};

// T: uint8, 16-bit floats, float, double. Returns whether a float image holds NaN.
template <class T>
bool quantize_cpu(const T* images,    // [samples, length]
                  const bool* where,  // [samples] or null
                  T* out,             // [samples, length]
                  int64_t samples, int64_t length, Levels levels, ParallelFor parallel);

template <class T>
void quantize_cuda(const T* images, const bool* where, T* out, int64_t samples, int64_t length, Levels levels,
                   CudaStream stream);

// A value is its pixel plus what its neighbours hand on, added in this order: 1/16 of the error of the upper left one,
// 5/16 of the upper, 3/16 of the upper right, 7/16 of the left. Each plane on its own. Returns whether a float image
// holds a number that is not finite, or so large that a result is not.
template <class T>
bool dither_cpu(const T* images, const bool* where, T* out, PlaneShape shape, Levels levels, ParallelFor parallel);

// `errors` is room for the last errors of a band of rows: [samples, channels, width], not needed up to 32 rows.
template <class T, class C>
void dither_cuda(const T* images, const bool* where, T* out, C* errors, PlaneShape shape, Levels levels,
                 CudaStream stream);

}  // namespace bbfast

// Bilinear sampling at grid points in -1..1 (align_corners, zeros outside), for the samples in `where`; the others are
// copied.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct WarpShape {
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool
      channels_last;  // order of images and out: [samples, height, width, channels] instead of [samples, channels, ...]
  int64_t grid_stride;  // elements between the grids of two samples, 0 if all share one
  bool truncate;        // uint8 images only: cut the fraction off instead of rounding half to even
};

// What a CPU kernel met besides numbers; bits of its result.
enum WarpFinding : int { kWarpImageNan = 1, kWarpGridNan = 2 };

// T: uint8, 16-bit floats, float, double; C: float, or double for double images.
template <class T, class C>
int warp_cpu(const T* images,
             const C* grid,      // [1 | samples, height, width, 2], (x, y)
             const bool* where,  // [samples] or null
             T* out, WarpShape shape, ParallelFor parallel);

template <class T, class C>
void warp_cuda(const T* images, const C* grid, const bool* where, T* out, WarpShape shape, CudaStream stream);

}  // namespace bbfast

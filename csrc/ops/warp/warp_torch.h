// Checks and sizes that the CPU and the CUDA torch layer of warp share.
#pragma once

#include "common/image_batch.h"
#include "ops/warp/warp.h"

namespace bbfast {

inline void check_warp(const Tensor& images, const Tensor& grid, const std::optional<Tensor>& where) {
  check_images("warp", images);
  check_where("warp", where, images);
  check_dtype("warp", "grid", grid, compute_type(images.scalar_type()));
  BBFAST_CHECK_VALUE(grid.dim() == 4 && (grid.size(0) == 1 || grid.size(0) == images.size(0)) &&
                         grid.size(1) == images.size(2) && grid.size(2) == images.size(3) && grid.size(3) == 2,
                     "warp: grid must be [1 | N, H, W, 2] for images of shape ", shape_of(images), ", got ",
                     shape_of(grid));
  BBFAST_CHECK_VALUE(grid.device() == images.device(), "warp: grid must be on the device of images");
  BBFAST_CHECK_VALUE(images.size(2) * images.size(3) < (int64_t{1} << 31) - 1,
                     "warp: images of 2^31 pixels are too large");
}

inline WarpShape warp_shape(const ImageBatch& batch, const Tensor& grid, bool truncate) {
  const int64_t stride = grid.size(0) == 1 ? 0 : batch.height * batch.width * 2;
  return {batch.shape.samples, batch.channels, batch.height, batch.width, batch.last(), stride, truncate};
}

}  // namespace bbfast

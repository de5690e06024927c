// What the CPU and the CUDA torch layer of quantize share.
#pragma once

#include "common/image_batch.h"
#include "ops/quantize/quantize.h"

namespace bbfast {

inline Levels check_quantize(const Tensor& images, int64_t levels, const std::optional<Tensor>& where, bool truncate) {
  check_images("quantize", images);
  check_where("quantize", where, images);
  BBFAST_CHECK_VALUE(levels >= 2 && levels <= 256, "quantize: levels must lie in 2..256, got ", levels);
  return {levels - 1, truncate && images.scalar_type() == ScalarType::Byte};
}

inline PlaneShape plane_shape(const ImageBatch& batch) {
  return {batch.shape.samples, batch.channels, batch.height, batch.width, batch.last()};
}

}  // namespace bbfast

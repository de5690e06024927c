// What the CPU and the CUDA torch layer of add share: checks, and how delta lies beside the images.
#pragma once

#include <algorithm>

#include "common/image_batch.h"
#include "ops/add/add.h"

namespace bbfast {

// delta in the order of the batch's memory.
struct Delta {
  Tensor tensor;
  AddShape shape;
};

inline bool is_row(const Tensor& delta) {
  return delta.dim() == 1;
}

// A row is what sinusoid adds.
inline const char* name_of(const Tensor& delta) {
  return is_row(delta) ? "sinusoid" : "add";
}

// One row for all rows and channels is laid out a few times in a row: kernels then work on pieces worth their while,
// and, since 16 rows end on a multiple of 16 elements whatever the width, in aligned ones.
inline Delta make_delta(const ImageBatch& batch,
                        const Tensor& delta  // [1 | N, C, H, W] or [W]
) {
  constexpr int64_t kPeriod = 2048;
  const int64_t length = batch.shape.planes * batch.shape.length;
  if (!is_row(delta)) {
    const bool own = delta.size(0) != 1 && batch.shape.samples != 1;
    return {dense(delta, batch.format), {batch.shape.samples, length, own ? 0 : length}};
  }
  const int64_t width = std::max<int64_t>(1, batch.width);
  const int64_t rows = std::min(batch.height, (kPeriod + 16 * width - 1) / (16 * width) * 16);
  const int64_t channels = batch.last() ? batch.channels : 1;
  const Tensor tile = dense(expand(delta, {1, channels, rows, batch.width}), batch.format);
  return {tile, {batch.shape.samples, length, channels * rows * batch.width}};
}

inline void check_add(const Tensor& images, const Tensor& delta, const std::optional<Tensor>& where, bool truncate) {
  const char* op = name_of(delta);
  check_images(op, images);
  check_where(op, where, images);
  if (is_row(delta)) {
    BBFAST_CHECK_VALUE(delta.size(0) == images.size(3) && delta.device() == images.device(), op, ": delta must be [",
                       images.size(3), "] on the device of images, got ", shape_of(delta));
  } else {
    check_companion(op, "delta", delta, images, false);
  }
  const ScalarType dtype = images.scalar_type();
  check_dtype(op, "delta", delta, truncate && dtype == ScalarType::Byte ? ScalarType::Double : compute_type(dtype));
}

// Calls `body(T{}, D{})`: the images' type and delta's.
template <class F>
void dispatch_add(const Tensor& images, bool truncate, F&& body) {
  dispatch_image(images.scalar_type(), "add", "images", [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (truncate) return body(t, double{});
    }
    body(t, Compute<T>{});
  });
}

}  // namespace bbfast

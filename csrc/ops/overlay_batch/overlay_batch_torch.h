// Checks, allocation and element types that the CPU and the CUDA torch layer of overlay_batch share.
#pragma once

#include <vector>

#include "common/image_batch.h"
#include "ops/overlay_batch/overlay_batch.h"

namespace bbfast {

// Both banks in dense memory, in the order of the result.
struct OverlayInput {
  Tensor images, overlays, pairs, out;
  OverlayShape shape;
};

inline OverlayInput overlay_input(const Tensor& images, const Tensor& overlays, const Tensor& pairs,
                                  const std::vector<double>& mean, const std::vector<double>& std, ScalarType dtype,
                                  bool channels_last) {
  check_images("overlay_batch", images);
  BBFAST_CHECK_VALUE(overlays.dim() == 4 && overlays.size(1) == images.size(1) && overlays.size(2) == images.size(2) &&
                         overlays.size(3) == images.size(3),
                     "overlay_batch: overlays must be [R, ", images.size(1), ", ", images.size(2), ", ", images.size(3),
                     "] like images, got ", shape_of(overlays));
  const ScalarType compute = compute_type(dtype);
  BBFAST_CHECK_VALUE(images.scalar_type() == ScalarType::Byte || images.scalar_type() == compute,
                     "overlay_batch: images must be uint8 or ", torch::headeronly::toString(compute), ", got ",
                     torch::headeronly::toString(images.scalar_type()));
  check_dtype("overlay_batch", "overlays", overlays, images.scalar_type());
  check_dtype("overlay_batch", "pairs", pairs, ScalarType::Long);
  BBFAST_CHECK_VALUE(pairs.dim() == 2 && pairs.size(1) == 2, "overlay_batch: pairs must be [B, 2], got ",
                     shape_of(pairs));
  for (const Tensor& t : {overlays, pairs}) {
    BBFAST_CHECK_VALUE(t.device() == images.device(),
                       "overlay_batch: overlays and pairs must be on the device of images");
  }
  const auto channels = static_cast<size_t>(images.size(1));
  BBFAST_CHECK_VALUE((mean.empty() || mean.size() == channels) && (std.empty() || std.size() == channels),
                     "overlay_batch: mean and std must have one value for each of ", channels, " channels");
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const std::vector<int64_t> sizes{pairs.size(0), images.size(1), images.size(2), images.size(3)};
  return {dense(images, format),
          dense(overlays, format),
          torch::stable::contiguous(pairs),
          torch::stable::empty(sizes, dtype, std::nullopt, images.device(), std::nullopt, format),
          {pairs.size(0), images.size(0), overlays.size(0), images.size(1), images.size(2) * images.size(3),
           channels_last}};
}

// Calls `body(T{}, O{}, C{})`: element types of the banks and of the result, and the one to compute in.
template <class F>
void dispatch_overlay(const Tensor& images, ScalarType dtype, F&& body) {
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  dispatch_float(dtype, "overlay_batch", "dtype", [&](auto element) {
    using O = decltype(element);
    using C = Compute<O>;
    if (bytes) {
      body(uint8_t{}, O{}, C{});
    } else {
      body(C{}, O{}, C{});
    }
  });
}

}  // namespace bbfast

// Checks, allocation and sizes that the CPU and the CUDA torch layer of gather_augment share.
#pragma once

#include <vector>

#include "common/image_batch.h"
#include "ops/gather_augment/gather_augment.h"

namespace bbfast {

inline void check_gather(const Tensor& images, const Tensor& index, const std::optional<Tensor>& offset,
                         const std::optional<Tensor>& flip, int64_t padding, const std::vector<double>& mean,
                         const std::vector<double>& std) {
  check_images("gather_augment", images);
  check_dtype("gather_augment", "images", images, ScalarType::Byte);
  check_dtype("gather_augment", "index", index, ScalarType::Long);
  BBFAST_CHECK_VALUE(index.dim() == 1, "gather_augment: index must be [B], got ", shape_of(index));
  BBFAST_CHECK_VALUE(index.device() == images.device(), "gather_augment: index must be on the device of images");
  BBFAST_CHECK_VALUE(padding >= 0, "gather_augment: padding must be >= 0, got ", padding);
  if (offset) {
    check_dtype("gather_augment", "offset", *offset, ScalarType::Long);
    BBFAST_CHECK_VALUE(offset->dim() == 2 && offset->size(0) == index.size(0) && offset->size(1) == 2,
                       "gather_augment: offset must be [", index.size(0), ", 2], got ", shape_of(*offset));
    BBFAST_CHECK_VALUE(offset->device() == images.device(), "gather_augment: offset must be on the device of images");
  }
  if (flip) {
    check_dtype("gather_augment", "flip", *flip, ScalarType::Bool);
    BBFAST_CHECK_VALUE(flip->dim() == 1 && flip->size(0) == index.size(0), "gather_augment: flip must be [",
                       index.size(0), "], got ", shape_of(*flip));
    BBFAST_CHECK_VALUE(flip->device() == images.device(), "gather_augment: flip must be on the device of images");
  }
  const auto channels = static_cast<size_t>(images.size(1));
  BBFAST_CHECK_VALUE((mean.empty() || mean.size() == channels) && (std.empty() || std.size() == channels),
                     "gather_augment: mean and std must have one value for each of ", channels, " channels");
}

inline GatherShape gather_shape(const Tensor& images, const Tensor& index, int64_t padding, bool channels_last) {
  return {index.size(0),    images.size(0),   images.size(1),   images.size(2), images.size(3), images.stride(0),
          images.stride(1), images.stride(2), images.stride(3), padding,        channels_last};
}

inline Tensor new_batch(const Tensor& images, const Tensor& index, ScalarType dtype, bool channels_last) {
  const std::vector<int64_t> sizes{index.size(0), images.size(1), images.size(2), images.size(3)};
  return torch::stable::empty(sizes, dtype, std::nullopt, images.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The channels' numbers in the type the kernel computes in; `fallback` where none were given.
template <class C>
std::vector<C> channel_values(const std::vector<double>& values, int64_t channels, double fallback) {
  std::vector<C> result;
  for (int64_t c = 0; c < channels; ++c) result.push_back(static_cast<C>(values.empty() ? fallback : values[c]));
  return result;
}

inline std::optional<Tensor> dense_or_none(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace bbfast

// A batch of images as kernels see it: dense memory, in the order of the input's memory format.
#pragma once

#include <array>
#include <initializer_list>
#include <vector>

#include "common/batch_shape.h"
#include "common/torch.h"

namespace bbfast {

using torch::headeronly::MemoryFormat;

inline bool is_channels_last(const Tensor& t) {  // [N, C, H, W]
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Results keep the channels_last format of their images; any other strides become contiguous. The fake kernels
// (bbfast/ops/_layout.py) follow the same rule.
inline MemoryFormat result_format(const Tensor& images) {
  return !images.is_contiguous() && is_channels_last(images) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor dense(const Tensor& t, MemoryFormat format) {
  return torch::stable::contiguous(t, format);
}

inline Tensor new_images(const Tensor& like, MemoryFormat format) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor expand(const Tensor& t, std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> shape(sizes);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(shape),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A tensor [1 | N, 1 | C, H, W] that goes with a batch, made dense in the batch's format.
struct Companion {
  Tensor tensor;
  CompanionStride stride;
};

// A plane is H x W in a contiguous batch and the whole image in a channels_last one.
struct ImageBatch {
  Tensor images;
  MemoryFormat format;
  int64_t channels, height, width;
  BatchShape shape;

  explicit ImageBatch(const Tensor& input)
      : images(dense(input, result_format(input))),
        format(result_format(input)),
        channels(input.size(1)),
        height(input.size(2)),
        width(input.size(3)),
        shape{input.size(0), last() ? 1 : channels, last() ? channels * height * width : height * width} {}

  bool last() const { return format == MemoryFormat::ChannelsLast; }

  bool empty() const { return shape.samples * shape.planes * shape.length == 0; }

  Companion companion(const Tensor& t) const {
    const bool whole = t.size(1) == channels;
    const bool spread = !whole && last();
    const Tensor full = dense(spread ? expand(t, {t.size(0), channels, height, width}) : t, format);
    const int64_t own_planes = whole || spread ? shape.planes : 1;
    return {full, {t.size(0) == 1 ? 0 : own_planes * shape.length, own_planes == 1 ? 0 : shape.length}};
  }
};

inline void check_images(const char* op, const Tensor& images) {
  BBFAST_CHECK_VALUE(images.dim() == 4, op, ": images must be [N, C, H, W], got ", shape_of(images));
}

// `value` must be [1 | N, 1 | C, H, W] (with `one_channel`; else [1 | N, C, H, W]), of the given dtype, where the
// images are.
inline void check_companion(const char* op, const char* name, const Tensor& value, const Tensor& images,
                            bool one_channel) {
  const bool fits = value.dim() == 4 && (value.size(0) == 1 || value.size(0) == images.size(0)) &&
                    (value.size(1) == images.size(1) || (one_channel && value.size(1) == 1)) &&
                    value.size(2) == images.size(2) && value.size(3) == images.size(3);
  BBFAST_CHECK_VALUE(fits, op, ": ", name, " must fit images of shape ", shape_of(images), ", got ", shape_of(value));
  BBFAST_CHECK_VALUE(value.device() == images.device(), op, ": ", name, " must be on the device of images");
}

inline void check_where(const char* op, const std::optional<Tensor>& where, const Tensor& images) {
  if (!where) return;
  BBFAST_CHECK_VALUE(where->scalar_type() == ScalarType::Bool, op, ": where must be a bool tensor, got ",
                     torch::headeronly::toString(where->scalar_type()));
  BBFAST_CHECK_VALUE(where->dim() == 1 && where->size(0) == images.size(0), op, ": where must be [", images.size(0),
                     "], got ", shape_of(*where));
  BBFAST_CHECK_VALUE(where->device() == images.device(), op, ": where must be on the device of images");
}

inline Tensor dense_where(const std::optional<Tensor>& where, const Tensor& images) {
  return where ? torch::stable::contiguous(*where) : images;
}

inline const bool* where_data(const std::optional<Tensor>& where, const Tensor& kept) {
  return where ? static_cast<const bool*>(kept.const_data_ptr()) : nullptr;
}

inline void check_dtype(const char* op, const char* name, const Tensor& value, ScalarType expected) {
  BBFAST_CHECK_VALUE(value.scalar_type() == expected, op, ": ", name, " must be ",
                     torch::headeronly::toString(expected), " here, got ",
                     torch::headeronly::toString(value.scalar_type()));
}

inline ScalarType compute_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether any element is NaN; piece by piece, so that the inner loop has no exit and the end is not waited for.
template <class T>
bool has_nan(const Tensor& dense) {
  constexpr int64_t kPiece = 4096;
  const T* values = data<T>(dense);
  const int64_t count = dense.numel();
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = begin + kPiece < count ? begin + kPiece : count;
    int32_t nans = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto v = load(values[i]);
      nans += v != v ? 1 : 0;
    }
    if (nans != 0) return true;
  }
  return false;
}

}  // namespace bbfast

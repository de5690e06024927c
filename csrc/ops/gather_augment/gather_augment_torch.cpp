#include "ops/gather_augment/gather_augment_torch.h"

namespace bbfast {
namespace {

void check_range(const int64_t* index, const int64_t* offset, const GatherShape& shape) {
  for (int64_t b = 0; b < shape.count; ++b) {
    BBFAST_CHECK_INDEX(index[b] >= 0 && index[b] < shape.images, "gather_augment: index must lie in 0..",
                       shape.images - 1, ", got ", index[b], " at position ", b);
  }
  if (offset == nullptr) return;
  for (int64_t i = 0; i < 2 * shape.count; ++i) {
    BBFAST_CHECK_VALUE(offset[i] >= 0 && offset[i] <= 2 * shape.padding, "gather_augment: offset must lie in 0..",
                       2 * shape.padding, ", got ", offset[i], " at sample ", i / 2);
  }
}

Tensor gather_augment(const Tensor& images,                 // [M, C, H, W]
                      const Tensor& index,                  // [B]
                      const std::optional<Tensor>& offset,  // [B, 2]
                      const std::optional<Tensor>& flip,    // [B]
                      int64_t padding,
                      std::vector<double> mean,  // [C] or empty
                      std::vector<double> std,   // [C] or empty
                      ScalarType dtype, bool channels_last) {
  check_gather(images, index, offset, flip, padding, mean, std);
  const Tensor rows = torch::stable::contiguous(index);
  const std::optional<Tensor> offsets = dense_or_none(offset);
  const std::optional<Tensor> flips = dense_or_none(flip);
  const GatherShape shape = gather_shape(images, index, padding, channels_last);
  check_range(data<int64_t>(rows), data_or_null<int64_t>(offsets), shape);
  const Tensor out = new_batch(images, index, dtype, channels_last);
  dispatch_image(dtype, "gather_augment", "dtype", [&](auto element) {
    using O = decltype(element);
    using C = Compute<O>;
    gather_augment_cpu(data<uint8_t>(images), data<int64_t>(rows), data_or_null<int64_t>(offsets),
                       data_or_null<bool>(flips), channel_values<C>(mean, shape.channels, 0).data(),
                       channel_values<C>(std, shape.channels, 1).data(), mutable_data<O>(out), shape, torch_parallel);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def(
      "gather_augment(Tensor images, Tensor index, Tensor? offset, Tensor? flip, int padding, float[] mean, float[] "
      "std, "
      "ScalarType dtype, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("gather_augment", TORCH_BOX(&gather_augment));
}

}  // namespace bbfast

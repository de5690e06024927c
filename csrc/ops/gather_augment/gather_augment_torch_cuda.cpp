#include "common/torch_cuda.h"
#include "ops/gather_augment/gather_augment_torch.h"

namespace bbfast {
namespace {

Tensor gather_augment(const Tensor& images,                 // [M, C, H, W]
                      const Tensor& index,                  // [B]
                      const std::optional<Tensor>& offset,  // [B, 2]
                      const std::optional<Tensor>& flip,    // [B]
                      int64_t padding,
                      std::vector<double> mean,  // [C] or empty
                      std::vector<double> std,   // [C] or empty
                      ScalarType dtype, bool channels_last) {
  check_gather(images, index, offset, flip, padding, mean, std);
  BBFAST_CHECK_VALUE(images.size(1) <= kGatherMaxChannels, "gather_augment: images on CUDA must have at most ",
                     kGatherMaxChannels, " channels, got ", images.size(1));
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Tensor out = new_batch(images, index, dtype, channels_last);
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(index);
  const std::optional<Tensor> offsets = dense_or_none(offset);
  const std::optional<Tensor> flips = dense_or_none(flip);
  const GatherShape shape = gather_shape(images, index, padding, channels_last);
  dispatch_image(dtype, "gather_augment", "dtype", [&](auto element) {
    using O = CudaElement<decltype(element)>;
    using C = Compute<decltype(element)>;
    gather_augment_cuda(data<uint8_t>(images), data<int64_t>(rows), data_or_null<int64_t>(offsets),
                        data_or_null<bool>(flips), channel_values<C>(mean, shape.channels, 0).data(),
                        channel_values<C>(std, shape.channels, 1).data(), mutable_data<O>(out), shape,
                        current_stream(images));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("gather_augment", TORCH_BOX(&gather_augment));
}

}  // namespace bbfast

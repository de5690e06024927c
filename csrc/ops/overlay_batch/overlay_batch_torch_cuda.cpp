#include "common/torch_cuda.h"
#include "ops/overlay_batch/overlay_batch_torch.h"

namespace bbfast {
namespace {

Tensor overlay_batch(const Tensor& images,      // [N, C, H, W]
                     const Tensor& overlays,    // [R, C, H, W]
                     const Tensor& pairs,       // [B, 2]
                     std::vector<double> mean,  // [C] or empty
                     std::vector<double> std,   // [C] or empty
                     double own, double other, bool clip, ScalarType dtype, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const OverlayInput in = overlay_input(images, overlays, pairs, mean, std, dtype, channels_last);
  BBFAST_CHECK_VALUE(images.size(1) <= kOverlayMaxChannels, "overlay_batch: images on CUDA must have at most ",
                     kOverlayMaxChannels, " channels, got ", images.size(1));
  if (in.out.numel() == 0) return in.out;
  dispatch_overlay(images, dtype, [&](auto t, auto o, auto c) {
    using T = decltype(t);
    using O = CudaElement<decltype(o)>;
    using C = decltype(c);
    const auto scale = overlay_scale<C>(mean, std, in.shape.channels, own, other, clip);
    overlay_batch_cuda(data<T>(in.images), data<T>(in.overlays), data<int64_t>(in.pairs), mutable_data<O>(in.out),
                       in.shape, scale, current_stream(images));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return in.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("overlay_batch", TORCH_BOX(&overlay_batch));
}

}  // namespace bbfast

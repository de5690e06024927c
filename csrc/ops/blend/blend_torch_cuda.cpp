#include "common/torch_cuda.h"
#include "ops/blend/blend_torch.h"

namespace bbfast {
namespace {

Tensor blend(const Tensor& images,                  // [N, C, H, W]
             const Tensor& pattern,                 // [1 | N, C, H, W]
             double alpha,                          // 0..1, unless there are weights
             const std::optional<Tensor>& weights,  // [1 | N, 1, 1, 1] or [1, 1, H, W]
             const std::optional<Tensor>& where,    // [N]
             bool truncate) {
  const bool cut = check_blend(images, pattern, alpha, where, truncate);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const BlendWeights own_weights = blend_weights(batch, alpha, weights, cut);
  if (batch.empty()) return out;
  const Companion own_pattern = batch.companion(pattern);
  const Tensor kept = dense_where(where, images);
  dispatch_mix("blend", images, pattern, [&](auto t, auto p, auto c) {
    using T = CudaElement<decltype(t)>;
    using P = CudaElement<decltype(p)>;
    using C = decltype(c);
    const auto run = [&]<class A>(A) {
      blend_cuda(data<T>(batch.images), data<P>(own_pattern.tensor), own_weights.alpha<A>(), where_data(where, kept),
                 mutable_data<T>(out), batch.shape, own_pattern.stride, current_stream(images));
    };
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (cut) return run(double{});
    }
    run(C{});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("blend", TORCH_BOX(&blend));
}

}  // namespace bbfast

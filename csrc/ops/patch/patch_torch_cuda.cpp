#include "common/mix_torch.h"
#include "common/torch_cuda.h"
#include "ops/patch/patch.h"

namespace bbfast {
namespace {

Tensor patch(const Tensor& images,               // [N, C, H, W]
             const Tensor& pattern,              // [1 | N, C, H, W]
             const Tensor& mask,                 // [1 | N, 1 | C, H, W]
             const std::optional<Tensor>& where  // [N]
) {
  check_images("patch", images);
  check_companion("patch", "pattern", pattern, images, false);
  check_companion("patch", "mask", mask, images, true);
  check_where("patch", where, images);
  check_dtype("patch", "mask", mask, compute_type(images.scalar_type()));
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  if (batch.empty()) return out;
  const Companion own_pattern = batch.companion(pattern);
  const Companion own_mask = batch.companion(mask);
  const Tensor kept = dense_where(where, images);
  dispatch_mix("patch", images, pattern, [&](auto t, auto p, auto c) {
    using T = CudaElement<decltype(t)>;
    using P = CudaElement<decltype(p)>;
    using C = decltype(c);
    patch_cuda(data<T>(batch.images), data<P>(own_pattern.tensor), data<C>(own_mask.tensor), where_data(where, kept),
               mutable_data<T>(out), batch.shape, own_pattern.stride, own_mask.stride, current_stream(images));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("patch", TORCH_BOX(&patch));
}

}  // namespace bbfast

#include "common/torch_cuda.h"
#include "ops/add/add_torch.h"

namespace bbfast {
namespace {

Tensor add(const Tensor& images,                // [N, C, H, W]
           const Tensor& delta,                 // [1 | N, C, H, W] or [W]
           const std::optional<Tensor>& where,  // [N]
           bool truncate) {
  check_add(images, delta, where, truncate);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  if (batch.empty()) return out;
  const Delta own = make_delta(batch, delta);
  const Tensor kept = dense_where(where, images);
  dispatch_add(images, truncate, [&](auto t, auto d) {
    using T = CudaElement<decltype(t)>;
    using D = decltype(d);
    add_cuda(data<T>(batch.images), data<D>(own.tensor), where_data(where, kept), mutable_data<T>(out), own.shape,
             current_stream(images));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("add", TORCH_BOX(&add));
}

}  // namespace bbfast

#include "common/torch_cuda.h"
#include "ops/warp/warp_torch.h"

namespace bbfast {
namespace {

Tensor warp(const Tensor& images,                // [N, C, H, W]
            const Tensor& grid,                  // [1 | N, H, W, 2]
            const std::optional<Tensor>& where,  // [N]
            bool truncate) {
  check_warp(images, grid, where);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  if (batch.empty()) return out;
  const Tensor points = torch::stable::contiguous(grid);
  const Tensor kept = dense_where(where, images);
  dispatch_image(images.scalar_type(), "warp", "images", [&](auto element) {
    using T = CudaElement<decltype(element)>;
    using C = Compute<decltype(element)>;
    warp_cuda(data<T>(batch.images), data<C>(points), where_data(where, kept), mutable_data<T>(out),
              warp_shape(batch, points, truncate), current_stream(images));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("warp", TORCH_BOX(&warp));
}

}  // namespace bbfast

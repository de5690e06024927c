#include "common/torch_cuda.h"
#include "ops/quantize/quantize_torch.h"

namespace bbfast {
namespace {

Tensor quantize(const Tensor& images,  // [N, C, H, W]
                int64_t levels,        // 2..256
                bool dither,
                const std::optional<Tensor>& where,  // [N]
                bool truncate) {
  const Levels checked = check_quantize(images, levels, where, truncate);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  if (batch.empty()) return out;
  const Tensor kept = dense_where(where, images);
  const int64_t room = dither && batch.height > 32 ? batch.shape.samples * batch.channels * batch.width : 0;
  const Tensor errors = torch::stable::new_empty(images, {room}, compute_type(images.scalar_type()));
  dispatch_image(images.scalar_type(), "quantize", "images", [&](auto t) {
    using T = CudaElement<decltype(t)>;
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* from = data<T>(batch.images);
    T* to = mutable_data<T>(out);
    const bool* chosen = where_data(where, kept);
    if (dither) {
      dither_cuda(from, chosen, to, mutable_data<C>(errors), plane_shape(batch), checked, current_stream(images));
    } else {
      quantize_cuda(from, chosen, to, batch.shape.samples, batch.shape.planes * batch.shape.length, checked,
                    current_stream(images));
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
}

}  // namespace bbfast

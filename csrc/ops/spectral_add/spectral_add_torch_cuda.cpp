#include "common/torch_cuda.h"
#include "ops/spectral_add/spectral_add_torch.h"

namespace bbfast {
namespace {

Tensor spectral_add(const Tensor& images,       // [N, C, H, W]
                    const Tensor& pattern,      // [tile height, tile width]
                    std::vector<double> gains,  // [C], of Y, Cr and Cb for ycrcb
                    bool ycrcb, int64_t to_byte, const std::optional<Tensor>& where) {
  check_spectral(images, pattern, gains, ycrcb, to_byte, where);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  if (batch.empty()) return out;
  const Tensor tile = torch::stable::contiguous(pattern);
  const Tensor kept = dense_where(where, images);
  const SpectralShape shape = spectral_shape(batch, tile);
  const ToByte rounding = static_cast<ToByte>(to_byte);
  if (ycrcb) {
    spectral_ycrcb_cuda(data<uint8_t>(batch.images), data<float>(tile), where_data(where, kept),
                        mutable_data<uint8_t>(out), spectral_gains<float>(gains), rounding, shape,
                        current_stream(images));
  } else {
    dispatch_image(images.scalar_type(), "spectral_add", "images", [&](auto element) {
      using T = CudaElement<decltype(element)>;
      using C = Compute<decltype(element)>;
      spectral_add_cuda(data<T>(batch.images), data<C>(tile), where_data(where, kept), mutable_data<T>(out),
                        spectral_gains<C>(gains), rounding, shape, current_stream(images));
    });
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("spectral_add", TORCH_BOX(&spectral_add));
}

}  // namespace bbfast

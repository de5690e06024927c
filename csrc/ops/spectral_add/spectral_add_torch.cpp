#include "ops/spectral_add/spectral_add_torch.h"

namespace bbfast {
namespace {

Tensor spectral_add(const Tensor& images,       // [N, C, H, W]
                    const Tensor& pattern,      // [tile height, tile width]
                    std::vector<double> gains,  // [C], of Y, Cr and Cb for ycrcb
                    bool ycrcb, int64_t to_byte, const std::optional<Tensor>& where) {
  check_spectral(images, pattern, gains, ycrcb, to_byte, where);
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Tensor tile = torch::stable::contiguous(pattern);
  const Tensor kept = dense_where(where, images);
  const SpectralShape shape = spectral_shape(batch, tile);
  const ToByte rounding = static_cast<ToByte>(to_byte);
  if (ycrcb) {
    spectral_ycrcb_cpu(data<uint8_t>(batch.images), data<float>(tile), where_data(where, kept),
                       mutable_data<uint8_t>(out), spectral_gains<float>(gains), rounding, shape, torch_parallel);
    return out;
  }
  dispatch_image(images.scalar_type(), "spectral_add", "images", [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const bool nan = spectral_add_cpu(data<T>(batch.images), data<C>(tile), where_data(where, kept),
                                      mutable_data<T>(out), spectral_gains<C>(gains), rounding, shape, torch_parallel);
    BBFAST_CHECK_VALUE(!nan || !has_nan<T>(batch.images), "spectral_add: images must not contain NaN");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("spectral_add(Tensor images, Tensor pattern, float[] gains, bool ycrcb, int to_byte, Tensor? where) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("spectral_add", TORCH_BOX(&spectral_add));
}

}  // namespace bbfast

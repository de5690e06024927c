#include "ops/quantize/quantize_torch.h"

namespace bbfast {
namespace {

Tensor quantize(const Tensor& images,  // [N, C, H, W]
                int64_t levels,        // 2..256
                bool dither,
                const std::optional<Tensor>& where,  // [N]
                bool truncate) {
  const Levels checked = check_quantize(images, levels, where, truncate);
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Tensor kept = dense_where(where, images);
  dispatch_image(images.scalar_type(), "quantize", "images", [&](auto t) {
    using T = decltype(t);
    const T* from = data<T>(batch.images);
    T* to = mutable_data<T>(out);
    const bool* chosen = where_data(where, kept);
    const bool found = dither ? dither_cpu(from, chosen, to, plane_shape(batch), checked, torch_parallel)
                              : quantize_cpu(from, chosen, to, batch.shape.samples,
                                             batch.shape.planes * batch.shape.length, checked, torch_parallel);
    if (!found) return;
    BBFAST_CHECK_VALUE(!has_nan<T>(batch.images), "quantize: images must not contain NaN");
    BBFAST_CHECK_VALUE(false, "quantize: images must be finite, and not huge, for dithering");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("quantize(Tensor images, int levels, bool dither, Tensor? where, bool truncate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
}

}  // namespace bbfast

#include "ops/overlay_batch/overlay_batch_torch.h"

namespace bbfast {
namespace {

Tensor overlay_batch(const Tensor& images,      // [N, C, H, W]
                     const Tensor& overlays,    // [R, C, H, W]
                     const Tensor& pairs,       // [B, 2]
                     std::vector<double> mean,  // [C] or empty
                     std::vector<double> std,   // [C] or empty
                     double own, double other, bool clip, ScalarType dtype, bool channels_last) {
  const OverlayInput in = overlay_input(images, overlays, pairs, mean, std, dtype, channels_last);
  const int64_t* index = data<int64_t>(in.pairs);
  for (int64_t i = 0; i < 2 * in.shape.count; ++i) {
    const int64_t size = i % 2 == 0 ? in.shape.images : in.shape.overlays;
    BBFAST_CHECK_INDEX(index[i] >= 0 && index[i] < size, "overlay_batch: pairs[:, ", i % 2, "] must lie in 0..",
                       size - 1, ", got ", index[i], " at position ", i / 2);
  }
  dispatch_overlay(images, dtype, [&](auto t, auto o, auto c) {
    using T = decltype(t);
    using O = decltype(o);
    using C = decltype(c);
    const auto scale = overlay_scale<C>(mean, std, in.shape.channels, own, other, clip);
    overlay_batch_cpu(data<T>(in.images), data<T>(in.overlays), index, mutable_data<O>(in.out), in.shape, scale,
                      torch_parallel);
  });
  return in.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def(
      "overlay_batch(Tensor images, Tensor overlays, Tensor pairs, float[] mean, float[] std, float own, float other, "
      "bool clip, ScalarType dtype, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("overlay_batch", TORCH_BOX(&overlay_batch));
}

}  // namespace bbfast

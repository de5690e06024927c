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
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Companion own_pattern = batch.companion(pattern);
  const BlendWeights own_weights = blend_weights(batch, alpha, weights, cut);
  const Tensor kept = dense_where(where, images);
  dispatch_mix("blend", images, pattern, [&](auto t, auto p, auto c) {
    using T = decltype(t);
    using P = decltype(p);
    using C = decltype(c);
    const auto run = [&]<class A>(A) {
      if (own_weights.kept) check_unit_range<A>("blend", "alpha", *own_weights.kept);
      return blend_cpu(data<T>(batch.images), data<P>(own_pattern.tensor), own_weights.alpha<A>(),
                       where_data(where, kept), mutable_data<T>(out), batch.shape, own_pattern.stride, torch_parallel);
    };
    bool nan = false;
    if constexpr (std::is_same_v<T, uint8_t>) {
      nan = cut ? run(double{}) : run(float{});
      // A byte cannot show that its pattern was NaN in the truncating formula.
      nan = nan || (cut && std::is_same_v<P, float>);
    } else {
      nan = run(C{});
    }
    if (nan) blame_nan<T, P>("blend", batch.images, own_pattern.tensor);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("blend(Tensor images, Tensor pattern, float alpha, Tensor? weights, Tensor? where, bool truncate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("blend", TORCH_BOX(&blend));
}

}  // namespace bbfast

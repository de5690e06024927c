#include "common/mix_torch.h"
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
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Companion own_pattern = batch.companion(pattern);
  const Companion own_mask = batch.companion(mask);
  const Tensor kept = dense_where(where, images);
  dispatch_mix("patch", images, pattern, [&](auto t, auto p, auto c) {
    using T = decltype(t);
    using P = decltype(p);
    using C = decltype(c);
    check_unit_range<C>("patch", "mask", own_mask.tensor);
    const bool nan =
        patch_cpu(data<T>(batch.images), data<P>(own_pattern.tensor), data<C>(own_mask.tensor), where_data(where, kept),
                  mutable_data<T>(out), batch.shape, own_pattern.stride, own_mask.stride, torch_parallel);
    // Under a mask of zero the kernel does not look at the pattern.
    if (!std::is_same_v<P, uint8_t> && !nan) {
      BBFAST_CHECK_VALUE(!has_nan<P>(own_pattern.tensor), "patch: pattern must not contain NaN");
    }
    if (nan) blame_nan<T, P>("patch", batch.images, own_pattern.tensor);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("patch(Tensor images, Tensor pattern, Tensor mask, Tensor? where) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("patch", TORCH_BOX(&patch));
}

}  // namespace bbfast

#include "ops/add/add_torch.h"

namespace bbfast {
namespace {

Tensor add(const Tensor& images,                // [N, C, H, W]
           const Tensor& delta,                 // [1 | N, C, H, W] or [W]
           const std::optional<Tensor>& where,  // [N]
           bool truncate) {
  check_add(images, delta, where, truncate);
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Delta own = make_delta(batch, delta);
  const Tensor kept = dense_where(where, images);
  dispatch_add(images, truncate, [&](auto t, auto d) {
    using T = decltype(t);
    using D = decltype(d);
    const bool nan = add_cpu(data<T>(batch.images), data<D>(own.tensor), where_data(where, kept), mutable_data<T>(out),
                             own.shape, torch_parallel);
    if (!nan) return;
    BBFAST_CHECK_VALUE(!has_nan<T>(batch.images), name_of(delta), ": images must not contain NaN");
    BBFAST_CHECK_VALUE(!has_nan<D>(own.tensor), name_of(delta), ": delta must not contain NaN");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("add(Tensor images, Tensor delta, Tensor? where, bool truncate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("add", TORCH_BOX(&add));
}

}  // namespace bbfast

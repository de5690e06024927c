#include "ops/warp/warp_torch.h"

namespace bbfast {
namespace {

Tensor warp(const Tensor& images,                // [N, C, H, W]
            const Tensor& grid,                  // [1 | N, H, W, 2]
            const std::optional<Tensor>& where,  // [N]
            bool truncate) {
  check_warp(images, grid, where);
  const ImageBatch batch(images);
  const Tensor out = new_images(images, batch.format);
  const Tensor points = torch::stable::contiguous(grid);
  const Tensor kept = dense_where(where, images);
  dispatch_image(images.scalar_type(), "warp", "images", [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const int findings = warp_cpu(data<T>(batch.images), data<C>(points), where_data(where, kept), mutable_data<T>(out),
                                  warp_shape(batch, points, truncate), torch_parallel);
    BBFAST_CHECK_VALUE((findings & kWarpImageNan) == 0, "warp: images must not contain NaN");
    BBFAST_CHECK_VALUE((findings & kWarpGridNan) == 0, "warp: grid must not contain NaN");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("warp(Tensor images, Tensor grid, Tensor? where, bool truncate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("warp", TORCH_BOX(&warp));
}

}  // namespace bbfast

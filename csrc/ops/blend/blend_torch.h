// What the CPU and the CUDA torch layer of blend share: checks, and the weight's three shapes.
#pragma once

#include "common/mix_torch.h"
#include "ops/blend/blend.h"

namespace bbfast {

struct BlendWeights {
  std::optional<Tensor> kept;  // dense memory behind the pointers of alpha()
  bool per_sample = false;
  double number = 0;

  template <class A>
  Alpha<A> alpha() const {
    const A* values = kept ? data<A>(*kept) : nullptr;
    return {static_cast<A>(number), per_sample ? values : nullptr, per_sample ? nullptr : values};
  }
};

inline BlendWeights blend_weights(const ImageBatch& batch, double number,
                                  const std::optional<Tensor>& weights,  // [1 | N, 1, 1, 1] or [1, 1, H, W]
                                  bool truncate) {
  BlendWeights result;
  result.number = number;
  if (!weights) return result;
  const Tensor& w = *weights;
  const int64_t n = batch.shape.samples;
  check_dtype("blend", "weights", w, truncate ? ScalarType::Double : compute_type(batch.images.scalar_type()));
  BBFAST_CHECK_VALUE(w.device() == batch.images.device(), "blend: weights must be on the device of images");
  BBFAST_CHECK_VALUE(w.dim() == 4 && w.size(1) == 1, "blend: weights must be [1 | N, 1, 1, 1] or [1, 1, H, W], got ",
                     shape_of(w));
  if (w.size(2) == 1 && w.size(3) == 1 && (w.size(0) == 1 || w.size(0) == n)) {
    result.kept = torch::stable::contiguous(expand(w, {n, 1, 1, 1}));
    result.per_sample = true;
    return result;
  }
  BBFAST_CHECK_VALUE(w.size(0) == 1 && w.size(2) == batch.height && w.size(3) == batch.width,
                     "blend: weights must be [1 | N, 1, 1, 1] or [1, 1, H, W], got ", shape_of(w));
  result.kept = batch.companion(w).tensor;
  return result;
}

inline bool check_blend(const Tensor& images, const Tensor& pattern, double number, const std::optional<Tensor>& where,
                        bool truncate) {
  check_images("blend", images);
  check_companion("blend", "pattern", pattern, images, false);
  check_where("blend", where, images);
  BBFAST_CHECK_VALUE(number >= 0 && number <= 1, "blend: alpha must lie in 0..1, got ", number);
  return truncate && images.scalar_type() == ScalarType::Byte;
}

}  // namespace bbfast

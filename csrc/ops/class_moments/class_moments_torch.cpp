#include "ops/class_moments/class_moments_torch.h"

namespace bbfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> class_moments(const Tensor& features,               // [N, D]
                                                 const Tensor& labels,                 // [N]
                                                 int64_t num_classes,                  // K
                                                 const std::optional<Tensor>& count,   // [K]
                                                 const std::optional<Tensor>& mean,    // [K, D]
                                                 const std::optional<Tensor>& scatter  // [K, D, D]
) {
  const MomentsShape shape = check_moments(features, labels, num_classes);
  const std::optional<MomentTensors> old = old_moments(features, shape, count, mean, scatter);
  const Tensor rows = torch::stable::contiguous(features);
  const Tensor classes = torch::stable::contiguous(labels);
  const int64_t* values = data<int64_t>(classes);
  for (int64_t r = 0; r < shape.rows; ++r) {
    BBFAST_CHECK_INDEX(values[r] >= 0 && values[r] < num_classes, "class_moments: labels must lie in 0..",
                       num_classes - 1, ", got ", values[r], " at position ", r);
  }
  const MomentTensors out = new_moments(features, shape);
  dispatch_float(features.scalar_type(), "class_moments", "features", [&](auto element) {
    using T = decltype(element);
    class_moments_cpu(data<T>(rows), values, pointers(old), mutable_pointers(out), shape, torch_parallel);
  });
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def(
      "class_moments(Tensor features, Tensor labels, int num_classes, Tensor? count, Tensor? mean, Tensor? scatter) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments));
}

}  // namespace bbfast

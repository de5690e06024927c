#include "ops/gram_powers/gram_powers_torch.h"

namespace bbfast {
namespace {

Tensor gram_powers(const Tensor& features,  // [N, C, H, W]
                   std::vector<int64_t> orders, bool compat) {
  const GramShape shape = gram_shape(features, orders, compat);
  const Tensor out = new_grams(features, shape);
  dispatch_float(features.scalar_type(), "gram_powers", "features", [&](auto element) {
    using T = decltype(element);
    gram_powers_cpu(data<T>(features), orders.data(), mutable_data<T>(out), shape, torch_parallel);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("gram_powers(Tensor features, int[] orders, bool compat) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("gram_powers", TORCH_BOX(&gram_powers));
}

}  // namespace bbfast

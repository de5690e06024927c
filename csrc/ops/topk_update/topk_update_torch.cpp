#include "ops/topk_update/topk_update_torch.h"

namespace bbfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> topk_update(const std::optional<Tensor>& values,  // [C, k]
                                               const std::optional<Tensor>& ids,     // [C, k]
                                               const std::optional<Tensor>& nans,    // [C]
                                               const Tensor& activations,            // [N, C]
                                               const Tensor& index,                  // [N]
                                               int64_t k) {
  const TopKShape shape = check_topk(activations, index, k);
  const std::optional<TopKTensors> old = old_topk(activations, shape, values, ids, nans);
  const Tensor rows = torch::stable::contiguous(activations);
  const Tensor samples = torch::stable::contiguous(index);
  const int64_t* sample = data<int64_t>(samples);
  for (int64_t n = 0; n < shape.rows; ++n) {
    BBFAST_CHECK_INDEX(sample[n] >= 0, "topk_update: index must not be negative, got ", sample[n], " at position ", n);
  }
  const TopKTensors out = new_topk(activations, shape);
  dispatch_float(activations.scalar_type(), "topk_update", "activations", [&](auto element) {
    using T = decltype(element);
    topk_update_cpu(data<T>(rows), sample, pointers<T>(old), out.pointers<T>(), shape, torch_parallel);
  });
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def(
      "topk_update(Tensor? values, Tensor? ids, Tensor? nans, Tensor activations, Tensor index, int k) -> (Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("topk_update", TORCH_BOX(&topk_update));
}

}  // namespace bbfast

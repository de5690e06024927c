#include "common/torch.h"
#include "ops/softmax_entropy/softmax_entropy.h"

namespace bbfast {
namespace {

Tensor softmax_entropy(const Tensor& logits) {  // [N, K]
  BBFAST_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "softmax_entropy: logits must be [N, K] with K > 0, got ",
                     shape_of(logits));
  const Tensor dense = torch::stable::contiguous(logits);
  const Tensor entropy = torch::stable::new_empty(logits, {logits.size(0)});
  dispatch_float(logits.scalar_type(), "softmax_entropy", "logits", [&](auto element) {
    using T = decltype(element);
    softmax_entropy_cpu(data<T>(dense), mutable_data<T>(entropy), logits.size(0), logits.size(1), torch_parallel);
  });
  return entropy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def("softmax_entropy(Tensor logits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("softmax_entropy", TORCH_BOX(&softmax_entropy));
}

}  // namespace bbfast

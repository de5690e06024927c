#include "common/torch_cuda.h"
#include "ops/topk_update/topk_update_torch.h"

namespace bbfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> topk_update(const std::optional<Tensor>& values,  // [C, k]
                                               const std::optional<Tensor>& ids,     // [C, k]
                                               const std::optional<Tensor>& nans,    // [C]
                                               const Tensor& activations,            // [N, C]
                                               const Tensor& index,                  // [N]
                                               int64_t k) {
  const torch::stable::accelerator::DeviceGuard guard(activations.get_device_index());
  const TopKShape shape = check_topk(activations, index, k);
  const std::optional<TopKTensors> old = old_topk(activations, shape, values, ids, nans);
  const Tensor rows = torch::stable::contiguous(activations);
  const Tensor samples = torch::stable::contiguous(index);
  const TopKTensors out = new_topk(activations, shape);
  if (shape.columns == 0) return out.tuple();
  dispatch_float(activations.scalar_type(), "topk_update", "activations", [&](auto element) {
    using T = CudaElement<decltype(element)>;
    topk_update_cuda(data<T>(rows), data<int64_t>(samples), pointers<T>(old), out.pointers<T>(), shape,
                     current_stream(activations));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("topk_update", TORCH_BOX(&topk_update));
}

}  // namespace bbfast

#include "common/torch_cuda.h"
#include "ops/gram_powers/gram_powers_torch.h"

namespace bbfast {
namespace {

Tensor gram_powers(const Tensor& features,  // [N, C, H, W]
                   std::vector<int64_t> orders, bool compat) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const GramShape shape = gram_shape(features, orders, compat);
  const Tensor out = new_grams(features, shape);
  if (out.numel() == 0) return out;
  const std::vector<int64_t> channels{shape.samples, shape.channels};
  const Tensor exponents = torch::stable::new_empty(features, channels, ScalarType::Int);
  dispatch_float(features.scalar_type(), "gram_powers", "features", [&](auto element) {
    using T = CudaElement<decltype(element)>;
    gram_powers_cuda(data<T>(features), orders.data(), mutable_data<T>(out), mutable_data<int32_t>(exponents), shape,
                     current_stream(features));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("gram_powers", TORCH_BOX(&gram_powers));
}

}  // namespace bbfast

#include "common/torch_cuda.h"
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
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor rows = torch::stable::contiguous(features);
  const Tensor classes = torch::stable::contiguous(labels);
  const MomentTensors out = new_moments(features, shape);
  const std::vector<int64_t> n{shape.rows};
  const std::vector<int64_t> k{shape.classes};
  const std::vector<int64_t> kd{shape.classes, shape.width};
  const Tensor order = torch::stable::new_empty(labels, n);
  const Tensor batch_count = torch::stable::new_empty(labels, k);
  const Tensor batch_start = torch::stable::new_empty(labels, k);
  const Tensor batch_mean = torch::stable::new_empty(features, kd, ScalarType::Double);
  const MomentsScratch scratch{mutable_data<int64_t>(order), mutable_data<int64_t>(batch_count),
                               mutable_data<int64_t>(batch_start), mutable_data<double>(batch_mean)};
  dispatch_float(features.scalar_type(), "class_moments", "features", [&](auto element) {
    using T = CudaElement<decltype(element)>;
    class_moments_cuda(data<T>(rows), data<int64_t>(classes), pointers(old), mutable_pointers(out), scratch, shape,
                       current_stream(features));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments));
}

}  // namespace bbfast

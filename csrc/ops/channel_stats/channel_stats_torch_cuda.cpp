#include "common/torch_cuda.h"
#include "ops/channel_stats/channel_stats_torch.h"

namespace bbfast {
namespace {

std::tuple<Tensor, Tensor> channel_stats(const Tensor& activations,            // [N, C], [N, T, C] or [N, C, H, W]
                                         const std::optional<Tensor>& labels,  // [N]
                                         int64_t num_classes,                  // K; 1 without labels
                                         const std::optional<Tensor>& count,   // [K, C]
                                         const std::optional<Tensor>& values   // [5, K, C]
) {
  const torch::stable::accelerator::DeviceGuard guard(activations.get_device_index());
  const StatsInput input = stats_input(activations, labels, num_classes);
  const StatsShape& shape = input.shape;
  const std::optional<StatsTensors> old = old_stats(input, count, values);
  const StatsTensors out = new_stats(activations, shape);
  if (shape.channels == 0) return {out.count, out.values};
  const Tensor classes = labels ? torch::stable::contiguous(*labels) : activations;
  const int64_t* label = labels ? data<int64_t>(classes) : nullptr;
  const std::vector<int64_t> n{labels ? shape.samples : 0};
  const std::vector<int64_t> k{labels ? shape.classes : 0};
  const int64_t pieces = stats_pieces(shape);
  const std::vector<int64_t> part{shape.classes, pieces, kStatsPlanes, shape.channels};
  const Tensor order = torch::stable::new_empty(activations, n, ScalarType::Long);
  const Tensor batch_count = torch::stable::new_empty(activations, k, ScalarType::Long);
  const Tensor batch_start = torch::stable::new_empty(activations, k, ScalarType::Long);
  const Tensor parts = torch::stable::new_empty(activations, part, ScalarType::Double);
  const StatsScratch scratch{mutable_data<int64_t>(order), mutable_data<int64_t>(batch_count),
                             mutable_data<int64_t>(batch_start), mutable_data<double>(parts), pieces};
  dispatch_float(activations.scalar_type(), "channel_stats", "activations", [&](auto element) {
    using T = CudaElement<decltype(element)>;
    channel_stats_cuda(data<T>(input.activations), label, pointers(old), mutable_pointers(out), scratch, shape,
                       current_stream(activations));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out.count, out.values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bbfast, CUDA, m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
}

}  // namespace bbfast

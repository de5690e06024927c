#include "ops/channel_stats/channel_stats_torch.h"

namespace bbfast {
namespace {

std::tuple<Tensor, Tensor> channel_stats(const Tensor& activations,            // [N, C], [N, T, C] or [N, C, H, W]
                                         const std::optional<Tensor>& labels,  // [N]
                                         int64_t num_classes,                  // K; 1 without labels
                                         const std::optional<Tensor>& count,   // [K, C]
                                         const std::optional<Tensor>& values   // [5, K, C]
) {
  const StatsInput input = stats_input(activations, labels, num_classes);
  const std::optional<StatsTensors> old = old_stats(input, count, values);
  const Tensor classes = labels ? torch::stable::contiguous(*labels) : activations;
  const int64_t* label = labels ? data<int64_t>(classes) : nullptr;
  for (int64_t n = 0; label != nullptr && n < input.shape.samples; ++n) {
    BBFAST_CHECK_INDEX(label[n] >= 0 && label[n] < num_classes, "channel_stats: labels must lie in 0..",
                       num_classes - 1, ", got ", label[n], " at position ", n);
  }
  const StatsTensors out = new_stats(activations, input.shape);
  dispatch_float(activations.scalar_type(), "channel_stats", "activations", [&](auto element) {
    using T = decltype(element);
    channel_stats_cpu(data<T>(input.activations), label, pointers(old), mutable_pointers(out), input.shape,
                      torch_parallel);
  });
  return {out.count, out.values};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bbfast, m) {
  m.def(
      "channel_stats(Tensor activations, Tensor? labels, int num_classes, Tensor? count, Tensor? values) -> (Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bbfast, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
}

}  // namespace bbfast

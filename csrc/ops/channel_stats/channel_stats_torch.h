// Checks and allocation that the CPU and the CUDA torch layer of channel_stats share.
#pragma once

#include <tuple>
#include <vector>

#include "common/image_batch.h"
#include "ops/channel_stats/channel_stats.h"

namespace bbfast {

struct StatsTensors {
  Tensor count;   // int64 [K, C]
  Tensor values;  // float64 [5, K, C]
};

// Activations in dense memory, in the order that `shape` tells.
struct StatsInput {
  Tensor activations;
  StatsShape shape;
};

inline StatsInput stats_input(const Tensor& activations, const std::optional<Tensor>& labels, int64_t classes) {
  const int64_t dims = activations.dim();
  BBFAST_CHECK_VALUE(dims >= 2 && dims <= 4,
                     "channel_stats: activations must be [N, C], [N, T, C] or [N, C, H, W], got ",
                     shape_of(activations));
  BBFAST_CHECK_VALUE(classes > 0, "channel_stats: num_classes must be positive, got ", classes);
  const int64_t n = activations.size(0);
  if (labels) {
    check_dtype("channel_stats", "labels", *labels, ScalarType::Long);
    BBFAST_CHECK_VALUE(labels->dim() == 1 && labels->size(0) == n, "channel_stats: labels must be [", n, "], got ",
                       shape_of(*labels));
    BBFAST_CHECK_VALUE(labels->device() == activations.device(),
                       "channel_stats: labels must be on the device of activations");
  } else {
    BBFAST_CHECK_VALUE(classes == 1, "channel_stats: num_classes needs labels, got ", classes);
  }
  if (dims == 2) return {torch::stable::contiguous(activations), {n, activations.size(1), 1, classes, true}};
  if (dims == 3) {
    return {torch::stable::contiguous(activations), {n, activations.size(2), activations.size(1), classes, true}};
  }
  const MemoryFormat format = result_format(activations);
  const int64_t positions = activations.size(2) * activations.size(3);
  // With one position channels are neighbours in either format.
  return {dense(activations, format),
          {n, activations.size(1), positions, classes, format == MemoryFormat::ChannelsLast || positions == 1}};
}

inline StatsTensors new_stats(const Tensor& like, const StatsShape& s) {
  const std::vector<int64_t> kc{s.classes, s.channels};
  const std::vector<int64_t> all{kStatsPlanes, s.classes, s.channels};
  return {torch::stable::new_empty(like, kc, ScalarType::Long),
          torch::stable::new_empty(like, all, ScalarType::Double)};
}

// The state in dense memory; it must be given whole or not at all.
inline std::optional<StatsTensors> old_stats(const StatsInput& input, const std::optional<Tensor>& count,
                                             const std::optional<Tensor>& values) {
  BBFAST_CHECK_VALUE(count.has_value() == values.has_value(), "channel_stats: state needs count and values together");
  if (!count) return std::nullopt;
  const StatsShape& s = input.shape;
  check_dtype("channel_stats", "state.count", *count, ScalarType::Long);
  check_dtype("channel_stats", "state's values", *values, ScalarType::Double);
  const bool fits = count->dim() == 2 && count->size(0) == s.classes && count->size(1) == s.channels &&
                    values->dim() == 3 && values->size(0) == kStatsPlanes && values->size(1) == s.classes &&
                    values->size(2) == s.channels;
  BBFAST_CHECK_VALUE(fits, "channel_stats: state must be of ", s.classes, " classes and ", s.channels,
                     " channels, got ", shape_of(*count), ", ", shape_of(*values));
  for (const Tensor& t : {*count, *values}) {
    BBFAST_CHECK_VALUE(t.device() == input.activations.device(),
                       "channel_stats: state must be on the device of activations");
  }
  return StatsTensors{torch::stable::contiguous(*count), torch::stable::contiguous(*values)};
}

inline OldStats pointers(const std::optional<StatsTensors>& old) {
  if (!old) return {nullptr, nullptr};
  return {data<int64_t>(old->count), data<double>(old->values)};
}

inline NewStats mutable_pointers(const StatsTensors& s) {
  return {mutable_data<int64_t>(s.count), mutable_data<double>(s.values)};
}

}  // namespace bbfast

// Checks and allocation that the CPU and the CUDA torch layer of class_moments share.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "common/image_batch.h"
#include "ops/class_moments/class_moments.h"

namespace bbfast {

struct MomentTensors {
  Tensor count;    // int64 [K]
  Tensor mean;     // float64 [K, D]
  Tensor scatter;  // float64 [K, D, D]

  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {count, mean, scatter}; }
};

inline MomentsShape check_moments(const Tensor& features, const Tensor& labels, int64_t classes) {
  BBFAST_CHECK_VALUE(features.dim() == 2, "class_moments: features must be [N, D], got ", shape_of(features));
  BBFAST_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == features.size(0), "class_moments: labels must be [",
                     features.size(0), "], got ", shape_of(labels));
  check_dtype("class_moments", "labels", labels, ScalarType::Long);
  BBFAST_CHECK_VALUE(labels.device() == features.device(), "class_moments: labels must be on the device of features");
  BBFAST_CHECK_VALUE(classes > 0, "class_moments: num_classes must be positive, got ", classes);
  return {features.size(0), features.size(1), classes};
}

inline MomentTensors new_moments(const Tensor& features, const MomentsShape& s) {
  const std::vector<int64_t> k{s.classes};
  const std::vector<int64_t> kd{s.classes, s.width};
  const std::vector<int64_t> kdd{s.classes, s.width, s.width};
  return {torch::stable::new_empty(features, k, ScalarType::Long),
          torch::stable::new_empty(features, kd, ScalarType::Double),
          torch::stable::new_empty(features, kdd, ScalarType::Double)};
}

// The state in dense memory; it must be given whole or not at all.
inline std::optional<MomentTensors> old_moments(const Tensor& features, const MomentsShape& s,
                                                const std::optional<Tensor>& count, const std::optional<Tensor>& mean,
                                                const std::optional<Tensor>& scatter) {
  BBFAST_CHECK_VALUE(count.has_value() == mean.has_value() && mean.has_value() == scatter.has_value(),
                     "class_moments: state needs count, mean and scatter together");
  if (!count) return std::nullopt;
  check_dtype("class_moments", "state.count", *count, ScalarType::Long);
  check_dtype("class_moments", "state.mean", *mean, ScalarType::Double);
  check_dtype("class_moments", "state.scatter", *scatter, ScalarType::Double);
  const bool fits = count->dim() == 1 && count->size(0) == s.classes && mean->dim() == 2 &&
                    mean->size(0) == s.classes && mean->size(1) == s.width && scatter->dim() == 3 &&
                    scatter->size(0) == s.classes && scatter->size(1) == s.width && scatter->size(2) == s.width;
  BBFAST_CHECK_VALUE(fits, "class_moments: state must be of ", s.classes, " classes and width ", s.width, ", got ",
                     shape_of(*count), ", ", shape_of(*mean), ", ", shape_of(*scatter));
  for (const Tensor& t : {*count, *mean, *scatter}) {
    BBFAST_CHECK_VALUE(t.device() == features.device(), "class_moments: state must be on the device of features");
  }
  return MomentTensors{torch::stable::contiguous(*count), torch::stable::contiguous(*mean),
                       torch::stable::contiguous(*scatter)};
}

inline OldMoments pointers(const std::optional<MomentTensors>& old) {
  if (!old) return {nullptr, nullptr, nullptr};
  return {data<int64_t>(old->count), data<double>(old->mean), data<double>(old->scatter)};
}

inline NewMoments mutable_pointers(const MomentTensors& m) {
  return {mutable_data<int64_t>(m.count), mutable_data<double>(m.mean), mutable_data<double>(m.scatter)};
}

}  // namespace bbfast

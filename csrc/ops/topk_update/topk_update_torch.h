// Checks and allocation that the CPU and the CUDA torch layer of topk_update share.
#pragma once

#include <tuple>
#include <vector>

#include "common/image_batch.h"
#include "ops/topk_update/topk_update.h"

namespace bbfast {

struct TopKTensors {
  Tensor values;  // [C, k]
  Tensor ids;     // int64 [C, k]
  Tensor nans;    // int64 [C]

  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {values, ids, nans}; }

  template <class T>
  NewTopK<T> pointers() const {
    return {mutable_data<T>(values), mutable_data<int64_t>(ids), mutable_data<int64_t>(nans)};
  }
};

inline TopKShape check_topk(const Tensor& activations, const Tensor& index, int64_t k) {
  BBFAST_CHECK_VALUE(activations.dim() == 2, "topk_update: activations must be [N, C], got ", shape_of(activations));
  check_dtype("topk_update", "index", index, ScalarType::Long);
  BBFAST_CHECK_VALUE(index.dim() == 1 && index.size(0) == activations.size(0), "topk_update: index must be [",
                     activations.size(0), "], got ", shape_of(index));
  BBFAST_CHECK_VALUE(index.device() == activations.device(), "topk_update: index must be on the device of activations");
  BBFAST_CHECK_VALUE(k > 0, "topk_update: k must be positive, got ", k);
  return {activations.size(0), activations.size(1), k};
}

inline TopKTensors new_topk(const Tensor& like, const TopKShape& s) {
  const std::vector<int64_t> all{s.columns, s.kept};
  const std::vector<int64_t> c{s.columns};
  return {torch::stable::new_empty(like, all), torch::stable::new_empty(like, all, ScalarType::Long),
          torch::stable::new_empty(like, c, ScalarType::Long)};
}

// The state in dense memory; it must be given whole or not at all.
inline std::optional<TopKTensors> old_topk(const Tensor& activations, const TopKShape& s,
                                           const std::optional<Tensor>& values, const std::optional<Tensor>& ids,
                                           const std::optional<Tensor>& nans) {
  BBFAST_CHECK_VALUE(values.has_value() == ids.has_value() && ids.has_value() == nans.has_value(),
                     "topk_update: state needs values, ids and nans together");
  if (!values) return std::nullopt;
  check_dtype("topk_update", "state.values", *values, activations.scalar_type());
  check_dtype("topk_update", "state.ids", *ids, ScalarType::Long);
  check_dtype("topk_update", "state.nans", *nans, ScalarType::Long);
  const auto fits = [&](const Tensor& t) { return t.dim() == 2 && t.size(0) == s.columns && t.size(1) == s.kept; };
  BBFAST_CHECK_VALUE(fits(*values) && fits(*ids) && nans->dim() == 1 && nans->size(0) == s.columns,
                     "topk_update: state must be of ", s.columns, " channels and k = ", s.kept, ", got ",
                     shape_of(*values), ", ", shape_of(*ids), ", ", shape_of(*nans));
  for (const Tensor& t : {*values, *ids, *nans}) {
    BBFAST_CHECK_VALUE(t.device() == activations.device(), "topk_update: state must be on the device of activations");
  }
  return TopKTensors{torch::stable::contiguous(*values), torch::stable::contiguous(*ids),
                     torch::stable::contiguous(*nans)};
}

template <class T>
OldTopK<T> pointers(const std::optional<TopKTensors>& old) {
  if (!old) return {nullptr, nullptr, nullptr};
  return {data<T>(old->values), data<int64_t>(old->ids), data<int64_t>(old->nans)};
}

}  // namespace bbfast

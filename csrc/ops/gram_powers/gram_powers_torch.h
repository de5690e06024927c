// Checks and allocation that the CPU and the CUDA torch layer of gram_powers share.
#pragma once

#include <vector>

#include "common/torch.h"
#include "ops/gram_powers/gram_powers.h"

namespace bbfast {

inline GramShape gram_shape(const Tensor& features, const std::vector<int64_t>& orders, bool compat) {
  BBFAST_CHECK_VALUE(features.dim() == 4, "gram_powers: features must be [N, C, H, W], got ", shape_of(features));
  for (const int64_t order : orders) {
    BBFAST_CHECK_VALUE(order >= 1 && order <= kGramMaxOrder, "gram_powers: orders must lie in 1..", kGramMaxOrder,
                       ", got ", order);
  }
  return {features.size(0),
          features.size(1),
          features.size(2),
          features.size(3),
          features.stride(0),
          features.stride(1),
          features.stride(2),
          features.stride(3),
          static_cast<int64_t>(orders.size()),
          compat};
}

inline Tensor new_grams(const Tensor& features, const GramShape& shape) {
  const std::vector<int64_t> sizes{shape.samples, shape.orders, shape.entries()};
  return torch::stable::new_empty(features, sizes);
}

}  // namespace bbfast

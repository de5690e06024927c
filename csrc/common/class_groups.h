// Samples sorted by class, for CPU kernels that work on one class after the other.
#pragma once

#include <cstdint>
#include <vector>

namespace bbfast {

// Rows of each class, in their order: the rows of class k are order[start[k] .. start[k + 1]). Without labels all rows
// are of class 0. Labels are in range.
struct ClassGroups {
  std::vector<int64_t> start;
  std::vector<int64_t> order;

  ClassGroups(const int64_t* labels, int64_t rows, int64_t classes) : start(classes + 1, 0), order(rows) {
    const auto label = [&](int64_t r) { return labels != nullptr ? labels[r] : 0; };
    for (int64_t r = 0; r < rows; ++r) ++start[label(r) + 1];
    for (int64_t k = 0; k < classes; ++k) start[k + 1] += start[k];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t r = 0; r < rows; ++r) order[next[label(r)]++] = r;
  }

  int64_t rows_of(int64_t k) const { return start[k + 1] - start[k]; }
  const int64_t* order_of(int64_t k) const { return order.data() + start[k]; }
};

}  // namespace bbfast

#include <algorithm>
#include <vector>

#include "common/class_groups.h"
#include "common/scalar.h"
#include "common/simd.h"
#include "ops/class_moments/class_moments.h"

namespace bbfast {
namespace {

constexpr int64_t kTile = 32;   // a task computes one kTile x kTile piece of one class's scatter matrix
constexpr int64_t kChunk = 32;  // rows centred at a time
constexpr int64_t kStrip = 4;   // tile rows whose sums stay in registers
constexpr int64_t kColumns = 256;

// Mean of the columns [from, from + count) over some rows.
template <class T>
BBFAST_CLONES void mean_columns(const T* features, int64_t width, const int64_t* order, int64_t rows, int64_t from,
                                int64_t count, double* mean) {
  double sum[kColumns] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = features + order[r] * width + from;
    for (int64_t j = 0; j < count; ++j) sum[j] += static_cast<double>(load(x[j]));
  }
  for (int64_t j = 0; j < count; ++j) mean[from + j] = rows > 0 ? sum[j] / static_cast<double>(rows) : 0.0;
}

// Columns [from, from + kTile) of some rows minus their mean; zero beyond the last column.
template <class T>
BBFAST_INLINE void centre(const T* features, int64_t width, const int64_t* order, int64_t rows, const double* mean,
                          int64_t from, double (*to)[kTile]) {
  const int64_t count = std::min(kTile, width - from);
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = features + order[r] * width + from;
    for (int64_t j = 0; j < count; ++j) to[r][j] = static_cast<double>(load(x[j])) - mean[from + j];
    for (int64_t j = count; j < kTile; ++j) to[r][j] = 0.0;
  }
}

// Eight doubles that the compiler keeps in one, two or four registers, as the processor has them.
using Wide = double __attribute__((vector_size(64), may_alias));
constexpr int64_t kWide = sizeof(Wide) / sizeof(double);

BBFAST_INLINE Wide& wide(double* at) {
  return *reinterpret_cast<Wide*>(at);
}
BBFAST_INLINE const Wide& wide(const double* at) {
  return *reinterpret_cast<const Wide*>(at);
}

// sums[i][j] += sum over rows of a[r][i] * b[r][j], row by row. Four by sixteen sums at a time stay in registers.
BBFAST_INLINE void add_products(const double (*a)[kTile], const double (*b)[kTile], int64_t rows,
                                double (*sums)[kTile]) {
  for (int64_t i = 0; i < kTile; i += kStrip) {
    for (int64_t j = 0; j < kTile; j += 2 * kWide) {
      Wide strip[kStrip][2];
      for (int64_t s = 0; s < kStrip; ++s) {
        strip[s][0] = wide(&sums[i + s][j]);
        strip[s][1] = wide(&sums[i + s][j + kWide]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Wide left = wide(&b[r][j]);
        const Wide right = wide(&b[r][j + kWide]);
        for (int64_t s = 0; s < kStrip; ++s) {
          strip[s][0] += a[r][i + s] * left;
          strip[s][1] += a[r][i + s] * right;
        }
      }
      for (int64_t s = 0; s < kStrip; ++s) {
        wide(&sums[i + s][j]) = strip[s][0];
        wide(&sums[i + s][j + kWide]) = strip[s][1];
      }
    }
  }
}

template <class T>
BBFAST_CLONES void scatter_tile(const T* features, int64_t width, const int64_t* order, int64_t rows,
                                const double* mean, int64_t top, int64_t left, double (*sums)[kTile]) {
  alignas(64) double a[kChunk][kTile];
  alignas(64) double b[kChunk][kTile];
  for (int64_t r = 0; r < rows; r += kChunk) {
    const int64_t count = std::min(kChunk, rows - r);
    centre(features, width, order + r, count, mean, top, a);
    if (left != top) centre(features, width, order + r, count, mean, left, b);
    add_products(a, left != top ? b : a, count, sums);
  }
}

}  // namespace

template <class T>
void class_moments_cpu(const T* features, const int64_t* labels, OldMoments old, NewMoments out, MomentsShape shape,
                       ParallelFor parallel) {
  const int64_t d = shape.width;
  const ClassGroups groups(labels, shape.rows, shape.classes);
  std::vector<double> batch_mean(shape.classes * d);

  const int64_t pieces = (d + kColumns - 1) / kColumns;
  auto means = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / pieces;
      const int64_t from = (item - k * pieces) * kColumns;
      mean_columns(features, d, groups.order_of(k), groups.rows_of(k), from, std::min(kColumns, d - from),
                   batch_mean.data() + k * d);
    }
  };
  for_range(parallel, shape.classes * pieces, 1, means);

  // Chan, Golub and LeVeque (1983), eq. 1.5: the two groups' own scatter, and that of their means.
  const auto old_count = [&](int64_t k) { return old.count != nullptr ? old.count[k] : int64_t{0}; };
  const auto share = [&](int64_t k) {
    const int64_t total = old_count(k) + groups.rows_of(k);
    return total > 0 ? static_cast<double>(groups.rows_of(k)) / static_cast<double>(total) : 0.0;
  };
  const auto delta = [&](int64_t k, int64_t j) {
    return old.mean != nullptr ? batch_mean[k * d + j] - old.mean[k * d + j] : 0.0;
  };
  for (int64_t k = 0; k < shape.classes; ++k) {
    out.count[k] = old_count(k) + groups.rows_of(k);
    for (int64_t j = 0; j < d; ++j) {
      out.mean[k * d + j] = old.mean != nullptr ? old.mean[k * d + j] + delta(k, j) * share(k) : batch_mean[k * d + j];
    }
  }

  const int64_t tiles = (d + kTile - 1) / kTile;
  const int64_t pairs = tiles * (tiles + 1) / 2;
  auto scatters = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / pairs;
      int64_t pair = item - k * pairs;
      int64_t i = 0;
      while (pair >= tiles - i) pair -= tiles - i++;
      const int64_t top = i * kTile;
      const int64_t left = (i + pair) * kTile;
      alignas(64) double sums[kTile][kTile] = {};
      scatter_tile(features, d, groups.order_of(k), groups.rows_of(k), batch_mean.data() + k * d, top, left, sums);
      const double weight = static_cast<double>(old_count(k)) * share(k);
      const auto finish = [&](int64_t row, int64_t column, double sum) {
        const int64_t at = (k * d + row) * d + column;
        const double before = old.scatter != nullptr ? old.scatter[at] : 0.0;
        out.scatter[at] = before + sum + delta(k, row) * delta(k, column) * weight;
      };
      for (int64_t r = top; r < std::min(top + kTile, d); ++r) {
        for (int64_t c = left; c < std::min(left + kTile, d); ++c) finish(r, c, sums[r - top][c - left]);
      }
      if (left == top) continue;
      for (int64_t c = left; c < std::min(left + kTile, d); ++c) {
        for (int64_t r = top; r < std::min(top + kTile, d); ++r) finish(c, r, sums[r - top][c - left]);
      }
    }
  };
  for_range(parallel, shape.classes * pairs, 1, scatters);
}

template void class_moments_cpu(const float*, const int64_t*, OldMoments, NewMoments, MomentsShape, ParallelFor);
template void class_moments_cpu(const double*, const int64_t*, OldMoments, NewMoments, MomentsShape, ParallelFor);
template void class_moments_cpu(const Half*, const int64_t*, OldMoments, NewMoments, MomentsShape, ParallelFor);
template void class_moments_cpu(const BFloat16*, const int64_t*, OldMoments, NewMoments, MomentsShape, ParallelFor);

}  // namespace bbfast

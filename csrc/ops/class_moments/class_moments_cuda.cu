#include "common/class_order.cuh"
#include "common/cuda.cuh"
#include "ops/class_moments/class_moments.h"

namespace bbfast {
namespace {

struct MomentsOrder {
  static __device__ const char* name() { return "class_moments"; }
};

constexpr int kThreads = kClassThreads;
constexpr unsigned kMaxBlocksY = 65535;

constexpr int kMeanColumns = 32;
constexpr int kMeanRows = kThreads / kMeanColumns;

// Mean of each class's rows in this batch, and the count and mean joined with those of earlier rows (Chan, Golub and
// LeVeque 1983). Every thread adds up every eighth row; the eight sums are added in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const T* __restrict__ features, MomentsScratch scratch, OldMoments old, NewMoments out, int64_t width,
                int64_t classes) {
  __shared__ double sums[kMeanRows][kMeanColumns];
  const int lane = threadIdx.x % kMeanColumns;
  const int phase = threadIdx.x / kMeanColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMeanColumns + lane;
  for (int64_t k = blockIdx.y; k < classes; k += gridDim.y) {
    const int64_t rows = scratch.batch_count[k];
    const int64_t* order = scratch.order + scratch.batch_start[k];
    double sum = 0;
    if (column < width) {
      for (int64_t r = phase; r < rows; r += kMeanRows) {
        sum += static_cast<double>(load(features[order[r] * width + column]));
      }
    }
    sums[phase][lane] = sum;
    __syncthreads();
    if (phase == 0 && column < width) {
      for (int p = 1; p < kMeanRows; ++p) sum += sums[p][lane];
      const double mean = rows > 0 ? sum / static_cast<double>(rows) : 0.0;
      const int64_t before = old.count != nullptr ? old.count[k] : 0;
      const int64_t total = before + rows;
      const double share = total > 0 ? static_cast<double>(rows) / static_cast<double>(total) : 0.0;
      const int64_t at = k * width + column;
      scratch.batch_mean[at] = mean;
      out.mean[at] = old.mean != nullptr ? old.mean[at] + (mean - old.mean[at]) * share : mean;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) out.count[k] = rows + (old.count != nullptr ? old.count[k] : 0);
    __syncthreads();
  }
}

constexpr int kTile = 32;   // a block computes one kTile x kTile piece of one class's scatter matrix
constexpr int kChunk = 16;  // rows centred at a time
constexpr int kSide = 16;   // kSide x kSide threads, each with 2 x 2 sums

template <class T>
__device__ __forceinline__ void centre(const T* features, const int64_t* order, int64_t rows, const double* mean,
                                       int64_t width, int64_t from, double (*to)[kTile + 1]) {
  for (int i = threadIdx.x; i < kChunk * kTile; i += kThreads) {
    const int r = i / kTile;
    const int64_t column = from + i % kTile;
    const bool valid = r < rows && column < width;
    to[r][i % kTile] = valid ? static_cast<double>(load(features[order[r] * width + column])) - mean[column] : 0.0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const T* __restrict__ features, MomentsScratch scratch, OldMoments old, NewMoments out,
                   int64_t width, int64_t classes, int64_t tiles) {
  __shared__ double a[kChunk][kTile + 1];
  __shared__ double b[kChunk][kTile + 1];
  int64_t pair = blockIdx.x;
  int64_t i = 0;
  while (pair >= tiles - i) pair -= tiles - i++;
  const int64_t top = i * kTile;
  const int64_t left = (i + pair) * kTile;
  const int row = threadIdx.x / kSide;
  const int column = threadIdx.x % kSide;
  for (int64_t k = blockIdx.y; k < classes; k += gridDim.y) {
    const int64_t rows = scratch.batch_count[k];
    const int64_t* order = scratch.order + scratch.batch_start[k];
    const double* mean = scratch.batch_mean + k * width;
    double sums[2][2] = {};
    for (int64_t base = 0; base < rows; base += kChunk) {
      centre(features, order + base, rows - base, mean, width, top, a);
      centre(features, order + base, rows - base, mean, width, left, b);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        const double a0 = a[r][row];
        const double a1 = a[r][row + kSide];
        const double b0 = b[r][column];
        const double b1 = b[r][column + kSide];
        sums[0][0] += a0 * b0;
        sums[0][1] += a0 * b1;
        sums[1][0] += a1 * b0;
        sums[1][1] += a1 * b1;
      }
      __syncthreads();
    }
    const int64_t before = old.count != nullptr ? old.count[k] : 0;
    const double total = static_cast<double>(before + rows);
    const double weight = before + rows > 0 ? static_cast<double>(before) * (static_cast<double>(rows) / total) : 0.0;
    for (int s = 0; s < 4; ++s) {
      const int64_t y = top + row + (s / 2) * kSide;
      const int64_t x = left + column + (s % 2) * kSide;
      if (y >= width || x >= width) continue;
      double value = sums[s / 2][s % 2];
      if (old.mean != nullptr) {
        value += (mean[y] - old.mean[k * width + y]) * (mean[x] - old.mean[k * width + x]) * weight;
      }
      const int64_t at = (k * width + y) * width + x;
      const int64_t mirror = (k * width + x) * width + y;
      out.scatter[at] = value + (old.scatter != nullptr ? old.scatter[at] : 0.0);
      if (left != top) out.scatter[mirror] = value + (old.scatter != nullptr ? old.scatter[mirror] : 0.0);
    }
    __syncthreads();
  }
}

}  // namespace

template <class T>
void class_moments_cuda(const T* features, const int64_t* labels, OldMoments old, NewMoments out,
                        MomentsScratch scratch, MomentsShape s, CudaStream stream) {
  const auto blocks = static_cast<unsigned>(s.classes < kMaxBlocksY ? s.classes : kMaxBlocksY);
  order_by_class<MomentsOrder>(labels, scratch.batch_count, scratch.batch_start, scratch.order, s.rows, s.classes,
                               stream);
  // A width of zero still has counts to write.
  const auto pieces = static_cast<unsigned>((s.width + kMeanColumns - 1) / kMeanColumns);
  const dim3 mean_grid(pieces > 0 ? pieces : 1, blocks);
  mean_kernel<T><<<mean_grid, kThreads, 0, stream>>>(features, scratch, old, out, s.width, s.classes);
  const int64_t tiles = (s.width + kTile - 1) / kTile;
  if (tiles == 0) return;
  const dim3 scatter_grid(static_cast<unsigned>(tiles * (tiles + 1) / 2), blocks);
  scatter_kernel<T><<<scatter_grid, kThreads, 0, stream>>>(features, scratch, old, out, s.width, s.classes, tiles);
}

#define BBFAST_MOMENTS(T)                                                                                          \
  template void class_moments_cuda(const T*, const int64_t*, OldMoments, NewMoments, MomentsScratch, MomentsShape, \
                                   CudaStream)
BBFAST_MOMENTS(float);
BBFAST_MOMENTS(double);
BBFAST_MOMENTS(__half);
BBFAST_MOMENTS(__nv_bfloat16);

}  // namespace bbfast

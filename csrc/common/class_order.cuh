// Samples sorted by class on the device, for CUDA kernels that work on one class after the other. No host waits for it.
#pragma once

#include "common/cuda.cuh"
#include "common/stream.h"

namespace bbfast {

constexpr int kClassThreads = 256;

// How many rows each class has: a block a class, looking at every label. Counts are integers, so their order does not
// matter. `Op::name()` is for the message.
template <class Op>
__global__ void __launch_bounds__(kClassThreads)
    class_count_kernel(const int64_t* __restrict__ labels, int64_t* __restrict__ counts, int64_t rows,
                       int64_t classes) {
  __shared__ unsigned long long total;
  for (int64_t k = blockIdx.x; k < classes; k += gridDim.x) {
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned long long own = 0;
    for (int64_t r = threadIdx.x; r < rows; r += kClassThreads) {
      const int64_t label = labels[r];
      BBFAST_DEVICE_CHECK(label >= 0 && label < classes, "%s: labels must lie in 0..%lld, got %lld at position %lld",
                          Op::name(), static_cast<long long>(classes - 1), static_cast<long long>(label),
                          static_cast<long long>(r));
      own += label == k ? 1 : 0;
    }
    atomicAdd(&total, own);
    __syncthreads();
    if (threadIdx.x == 0) counts[k] = static_cast<int64_t>(total);
    __syncthreads();
  }
}

// The rows of each class, in their order, one class after the other: again a block a class, 256 labels at a time; a
// row's place is the number of the class's rows before it.
template <class Op>
__global__ void __launch_bounds__(kClassThreads)
    class_order_kernel(const int64_t* __restrict__ labels, const int64_t* __restrict__ counts,
                       int64_t* __restrict__ starts, int64_t* __restrict__ order, int64_t rows, int64_t classes) {
  constexpr int kWarps = kClassThreads / 32;
  __shared__ int in_warp[kWarps];
  __shared__ unsigned long long start;
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  for (int64_t k = blockIdx.x; k < classes; k += gridDim.x) {
    if (threadIdx.x == 0) start = 0;
    __syncthreads();
    unsigned long long earlier = 0;
    for (int64_t j = threadIdx.x; j < k; j += kClassThreads) earlier += static_cast<unsigned long long>(counts[j]);
    atomicAdd(&start, earlier);
    __syncthreads();
    int64_t next = static_cast<int64_t>(start);
    if (threadIdx.x == 0) starts[k] = next;
    for (int64_t base = 0; base < rows; base += kClassThreads) {
      const int64_t r = base + threadIdx.x;
      const bool own = r < rows && labels[r] == k;
      const unsigned votes = __ballot_sync(0xFFFFFFFFu, own);
      if (lane == 0) in_warp[warp] = __popc(votes);
      __syncthreads();
      int before = 0;
      int all = 0;
      for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? in_warp[w] : 0;
        all += in_warp[w];
      }
      if (own) order[next + before + __popc(votes & ((1u << lane) - 1u))] = r;
      next += all;
      __syncthreads();
    }
    __syncthreads();
  }
}

// Fills counts and starts [classes] and order [rows]: the rows of class k are order[starts[k] .. starts[k] +
// counts[k]).
template <class Op>
void order_by_class(const int64_t* labels, int64_t* counts, int64_t* starts, int64_t* order, int64_t rows,
                    int64_t classes, CudaStream stream) {
  constexpr int64_t kMostBlocks = 65535;
  const auto blocks = static_cast<unsigned>(classes < kMostBlocks ? classes : kMostBlocks);
  class_count_kernel<Op><<<blocks, kClassThreads, 0, stream>>>(labels, counts, rows, classes);
  class_order_kernel<Op><<<blocks, kClassThreads, 0, stream>>>(labels, counts, starts, order, rows, classes);
}

}  // namespace bbfast

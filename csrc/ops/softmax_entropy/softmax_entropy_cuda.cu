#include "common/cuda.cuh"
#include "ops/softmax_entropy/softmax_entropy.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

template <class C>
__device__ __forceinline__ C group_max(C value, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) {
    const C other = __shfl_xor_sync(0xFFFFFFFFu, value, lane, width);
    value = value < other ? other : value;
  }
  return value;
}

template <class C>
__device__ __forceinline__ C group_sum(C value, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lane, width);
  return value;
}

// A group of `width` lanes (a power of two up to a warp) works on one row; the second sweep finds the row in the L1
// cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    entropy_kernel(const T* __restrict__ logits, T* __restrict__ entropy, int64_t rows, int64_t classes, int width) {
  using C = Compute<T>;
  constexpr C kFloor = std::is_same_v<C, double> ? C(-746) : C(-104);  // exp is 0 here; keeps 0 * -inf out of the sum
  const int lane = threadIdx.x & (width - 1);
  const int64_t groups = item_stride() / width;
  // All lanes of a warp take part in the shuffles: the loop runs until the warp's last group is done.
  const int64_t first = first_item() / width;
  const int64_t warp_first = (first_item() / 32) * 32 / width;
  for (int64_t base = warp_first, row = first; base < rows; base += groups, row += groups) {
    const bool valid = row < rows;
    const T* x = logits + (valid ? row : base) * classes;
    C top = load(x[lane < classes ? lane : 0]);
    for (int64_t k = lane; k < classes; k += width) {
      const C value = load(x[k]);
      top = top < value ? value : top;
    }
    top = group_max(top, width);
    C sum = 0;
    C weighted = 0;
    for (int64_t k = lane; k < classes; k += width) {
      const C d = load(x[k]) - top;
      const C floored = d < kFloor ? kFloor : d;
      const C e = exp(floored);
      sum += e;
      weighted += e * floored;
    }
    sum = group_sum(sum, width);
    weighted = group_sum(weighted, width);
    if (valid && lane == 0) entropy[row] = store<T>(log(sum) - weighted / sum);
  }
}

}  // namespace

template <class T>
void softmax_entropy_cuda(const T* logits, T* entropy, int64_t rows, int64_t classes, CudaStream stream) {
  int width = 1;
  while (width < 32 && width < classes) width *= 2;
  entropy_kernel<T><<<blocks_for(rows * width, kThreads), kThreads, 0, stream>>>(logits, entropy, rows, classes, width);
}

template void softmax_entropy_cuda(const float*, float*, int64_t, int64_t, CudaStream);
template void softmax_entropy_cuda(const double*, double*, int64_t, int64_t, CudaStream);
template void softmax_entropy_cuda(const __half*, __half*, int64_t, int64_t, CudaStream);
template void softmax_entropy_cuda(const __nv_bfloat16*, __nv_bfloat16*, int64_t, int64_t, CudaStream);

}  // namespace bbfast

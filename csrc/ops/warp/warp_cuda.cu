#include "common/cuda.cuh"
#include "ops/warp/warp.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

template <class T, class C>
__device__ __forceinline__ T finish_as(C value, bool truncate) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return truncate ? finish_truncated(value) : finish<T>(value);
  } else {
    return finish<T>(value);
  }
}

// A thread computes one pixel of one sample in all channels: the point is read and turned into corners and weights
// once.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    warp_kernel(const T* __restrict__ images, const C* __restrict__ grid, const bool* __restrict__ where,
                T* __restrict__ out, WarpShape shape) {
  const int64_t pixels = shape.height * shape.width;
  const int64_t step = shape.channels_last ? shape.channels : 1;
  const int64_t next = shape.channels_last ? 1 : pixels;
  const C right_edge = static_cast<C>(shape.width - 1);
  const C bottom_edge = static_cast<C>(shape.height - 1);
  for (int64_t item = first_item(); item < shape.samples * pixels; item += item_stride()) {
    int64_t pixel = 0;
    const int64_t n = divide(item, pixels, &pixel);
    const T* from = images + n * pixels * shape.channels;
    T* to = out + n * pixels * shape.channels + pixel * step;
    if (where != nullptr && !where[n]) {
      for (int64_t c = 0; c < shape.channels; ++c) to[c * next] = from[pixel * step + c * next];
      continue;
    }
    const C* point = grid + n * shape.grid_stride + pixel * 2;
    const C x = ((point[0] + C(1)) / C(2)) * right_edge;
    const C y = ((point[1] + C(1)) / C(2)) * bottom_edge;
    const C left = floor(x);
    const C top = floor(y);
    const C right = left + C(1);
    const C bottom = top + C(1);
    // Comparisons with NaN are false, so a NaN point lies outside; the casts below see in-range values only.
    const bool in_left = left >= C(0) && left <= right_edge;
    const bool in_right = right >= C(0) && right <= right_edge;
    const bool in_top = top >= C(0) && top <= bottom_edge;
    const bool in_bottom = bottom >= C(0) && bottom <= bottom_edge;
    const int64_t column_left = in_left ? static_cast<int64_t>(left) : 0;
    const int64_t column_right = in_right ? static_cast<int64_t>(right) : 0;
    const int64_t row_top = (in_top ? static_cast<int64_t>(top) : 0) * shape.width;
    const int64_t row_bottom = (in_bottom ? static_cast<int64_t>(bottom) : 0) * shape.width;
    const C w0 = in_left && in_top ? (right - x) * (bottom - y) : C(0);
    const C w1 = in_right && in_top ? (x - left) * (bottom - y) : C(0);
    const C w2 = in_left && in_bottom ? (right - x) * (y - top) : C(0);
    const C w3 = in_right && in_bottom ? (x - left) * (y - top) : C(0);
    const bool inside0 = in_left && in_top;
    const bool inside1 = in_right && in_top;
    const bool inside2 = in_left && in_bottom;
    const bool inside3 = in_right && in_bottom;
    for (int64_t c = 0; c < shape.channels; ++c) {
      const T* plane = from + c * next;
      // A corner outside counts as zero whatever stands at the place that is looked at instead.
      C v = (inside0 ? static_cast<C>(load(plane[(row_top + column_left) * step])) : C(0)) * w0;
      v = v + (inside1 ? static_cast<C>(load(plane[(row_top + column_right) * step])) : C(0)) * w1;
      v = v + (inside2 ? static_cast<C>(load(plane[(row_bottom + column_left) * step])) : C(0)) * w2;
      v = v + (inside3 ? static_cast<C>(load(plane[(row_bottom + column_right) * step])) : C(0)) * w3;
      to[c * next] = finish_as<T>(v, shape.truncate);
    }
  }
}

}  // namespace

template <class T, class C>
void warp_cuda(const T* images, const C* grid, const bool* where, T* out, WarpShape shape, CudaStream stream) {
  const int64_t items = shape.samples * shape.height * shape.width;
  warp_kernel<T, C><<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, grid, where, out, shape);
}

template void warp_cuda(const uint8_t*, const float*, const bool*, uint8_t*, WarpShape, CudaStream);
template void warp_cuda(const __half*, const float*, const bool*, __half*, WarpShape, CudaStream);
template void warp_cuda(const __nv_bfloat16*, const float*, const bool*, __nv_bfloat16*, WarpShape, CudaStream);
template void warp_cuda(const float*, const float*, const bool*, float*, WarpShape, CudaStream);
template void warp_cuda(const double*, const double*, const bool*, double*, WarpShape, CudaStream);

}  // namespace bbfast

#include "common/cuda.cuh"
#include "ops/quantize/quantize.h"

namespace bbfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

template <class T, class C>
__device__ __forceinline__ T finished(C level, bool truncate) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (truncate) return finish_truncated(level);
  }
  return finish<T>(level);
}

// A warp works on one plane, kWarp rows at a time: a lane has a row, and runs two pixels behind the row above, which is
// when the errors of the three pixels above are known. The lane above hands on one of them a step. `errors` takes the
// last row's from one band to the next.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    dither_kernel(const T* __restrict__ images, const bool* __restrict__ where, T* __restrict__ out, C* errors,
                  PlaneShape shape, Levels levels) {
  const int lane = threadIdx.x % kWarp;
  const int64_t pixels = shape.height * shape.width;
  const int64_t planes = shape.samples * shape.channels;
  const int64_t width = shape.width;
  const int64_t next = shape.last ? shape.channels : 1;
  const C top = std::is_same_v<T, uint8_t> ? C(255) : C(1);
  const C steps = static_cast<C>(levels.steps);
  const C scale = static_cast<C>(static_cast<double>(levels.steps) / static_cast<double>(top));
  // The plane is the same for a whole warp: all its lanes take part in every shuffle.
  for (int64_t plane = first_item() / kWarp; plane < planes; plane += item_stride() / kWarp) {
    int64_t channel = 0;
    const int64_t n = divide(plane, shape.channels, &channel);
    const int64_t begin = n * shape.channels * pixels + channel * (shape.last ? 1 : pixels);
    const T* from = images + begin;
    T* to = out + begin;
    if (where != nullptr && !where[n]) {
      for (int64_t i = lane; i < pixels; i += kWarp) to[i * next] = from[i * next];
      continue;
    }
    C* carried = errors + plane * width;
    for (int64_t band = 0; band < shape.height; band += kWarp) {
      const int64_t y = band + lane;
      const int64_t rows = shape.height - band < kWarp ? shape.height - band : kWarp;
      const bool takes = lane == 0 && band > 0;
      const bool gives = lane == kWarp - 1 && band + kWarp < shape.height;
      const int64_t row = y * width;
      C above_left = 0;
      C above = 0;
      C above_right = takes ? carried[0] : C(0);
      C error = 0;  // of the pixel just done
      C ahead = lane == 0 ? static_cast<C>(load(from[row * next])) : C(0);
      for (int64_t step = 0; step < width + 2 * (rows - 1); ++step) {
        const int64_t x = step - 2 * lane;
        const C handed = __shfl_up_sync(kAll, error, 1);
        above_left = above;
        above = above_right;
        above_right = lane > 0 ? handed : (takes && x + 1 < width ? carried[x + 1] : C(0));
        const C pixel = ahead;
        ahead =
            y < shape.height && x + 1 >= 0 && x + 1 < width ? static_cast<C>(load(from[(row + x + 1) * next])) : C(0);
        const C left = error;
        error = 0;
        if (y < shape.height && x >= 0 && x < width) {
          C v = pixel + above_left * C(0.0625);
          v = v + above * C(0.3125);
          v = v + above_right * C(0.1875);
          v = v + left * C(0.4375);
          const C level = rint(v * scale) * top / steps;
          error = v - level;
          to[(row + x) * next] = finished<T>(level, levels.truncate);
          if (gives) carried[x] = error;
        }
      }
      __syncwarp();
    }
  }
}

}  // namespace

template <class T, class C>
void dither_cuda(const T* images, const bool* where, T* out, C* errors, PlaneShape shape, Levels levels,
                 CudaStream stream) {
  const int64_t lanes = shape.samples * shape.channels * kWarp;
  dither_kernel<T, C><<<blocks_for(lanes, kThreads), kThreads, 0, stream>>>(images, where, out, errors, shape, levels);
}

#define BBFAST_DITHER(T, C) template void dither_cuda(const T*, const bool*, T*, C*, PlaneShape, Levels, CudaStream)
BBFAST_DITHER(uint8_t, float);
BBFAST_DITHER(__half, float);
BBFAST_DITHER(__nv_bfloat16, float);
BBFAST_DITHER(float, float);
BBFAST_DITHER(double, double);

}  // namespace bbfast

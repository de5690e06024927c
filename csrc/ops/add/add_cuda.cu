#include "common/cuda.cuh"
#include "ops/add/add.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

// Float and double bytes: as described in add.h; csrc/ops/add/add_cpu.cpp computes the same.
template <class T, class D>
__device__ __forceinline__ T sum(T x, D delta) {
  if constexpr (!std::is_same_v<T, uint8_t>) {
    const D v = load(x) + delta;
    const D low = v < D(0) ? D(0) : v;
    return store<T>(low > D(1) ? D(1) : low);
  } else if constexpr (std::is_same_v<D, double>) {
    return finish_truncated(static_cast<double>(x) + delta);
  } else {
    // The exact sum is rounded once: a float sum would be rounded before it is.
    const float reach = fminf(fmaxf(delta, -256.0f), 256.0f);
    const float whole = rintf(reach);
    const float rest = reach - whole;
    const int half = (rest == 0.5f ? 1 : 0) - (rest == -0.5f ? 1 : 0);
    const int value = static_cast<int>(x) + static_cast<int>(whole) + (half & -(x & 1));
    return static_cast<uint8_t>(min(max(value, 0), 255));
  }
}

// A thread computes V neighbouring elements of `together` samples; V divides the length of a sample and the period.
template <class T, class D, int V>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* __restrict__ images, const D* __restrict__ delta, const bool* __restrict__ where,
               T* __restrict__ out, AddShape shape, int64_t packs, int64_t together) {
  const int64_t groups = (shape.samples + together - 1) / together;
  for (int64_t index = first_item(); index < groups * packs; index += item_stride()) {
    int64_t pack = 0;
    const int64_t first = divide(index, packs, &pack) * together;
    const int64_t end = first + together < shape.samples ? first + together : shape.samples;
    int64_t from = (first * packs + pack) * V;
    if (shape.period != 0) divide(pack * V, shape.period, &from);
    Pack<D, V> d = load_pack<V>(delta + from);
    for (int64_t n = first; n < end; ++n) {
      const int64_t element = (n * packs + pack) * V;
      Pack<T, V> x = load_pack<V>(images + element);
      if (where == nullptr || where[n]) {
        if (shape.period == 0 && n > first) d = load_pack<V>(delta + element);
#pragma unroll
        for (int j = 0; j < V; ++j) x.v[j] = sum(x.v[j], d.v[j]);
      }
      store_pack<V>(out + element, x);
    }
  }
}

template <class T, class D, int V>
void launch(const T* images, const D* delta, const bool* where, T* out, const AddShape& shape, CudaStream stream) {
  const int64_t packs = shape.length / V;
  const int64_t together = samples_together(shape.samples, packs);
  const int64_t items = (shape.samples + together - 1) / together * packs;
  add_kernel<T, D, V>
      <<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, delta, where, out, shape, packs, together);
}

}  // namespace

template <class T, class D>
void add_cuda(const T* images, const D* delta, const bool* where, T* out, AddShape shape, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  if (shape.length % kWide == 0 && shape.period % kWide == 0 && aligned(images) && aligned(delta) && aligned(out)) {
    launch<T, D, kWide>(images, delta, where, out, shape, stream);
  } else {
    launch<T, D, 1>(images, delta, where, out, shape, stream);
  }
}

#define BBFAST_ADD(T, D) template void add_cuda(const T*, const D*, const bool*, T*, AddShape, CudaStream)
BBFAST_ADD(uint8_t, float);
BBFAST_ADD(uint8_t, double);
BBFAST_ADD(__half, float);
BBFAST_ADD(__nv_bfloat16, float);
BBFAST_ADD(float, float);
BBFAST_ADD(double, double);

}  // namespace bbfast

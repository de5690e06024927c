#include "common/cuda.cuh"
#include "ops/patch/patch.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

// A thread computes V neighbouring elements of one plane; V divides the plane's length.
template <class T, class P, class C, int V>
__global__ void __launch_bounds__(kThreads)
    patch_kernel(const T* __restrict__ images, const P* __restrict__ pattern, const C* __restrict__ mask,
                 const bool* __restrict__ where, T* __restrict__ out, BatchShape shape, CompanionStride ps,
                 CompanionStride ms, int64_t packs) {
  for (int64_t index = first_item(); index < packs; index += item_stride()) {
    const int64_t element = index * V;
    int64_t i = 0;
    int64_t plane = 0;
    const int64_t item = divide(element, shape.length, &i);
    const int64_t n = divide(item, shape.planes, &plane);
    Pack<T, V> x = load_pack<V>(images + element);
    if (where == nullptr || where[n]) {
      const Pack<P, V> p = load_pack<V>(pattern + n * ps.sample + plane * ps.plane + i);
      const Pack<C, V> a = load_pack<V>(mask + n * ms.sample + plane * ms.plane + i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x.v[j] = finish<T>(load(x.v[j]) * (C(1) - a.v[j]) + static_cast<C>(load(p.v[j])) * a.v[j]);
      }
    }
    store_pack<V>(out + element, x);
  }
}

}  // namespace

template <class T, class P, class C>
void patch_cuda(const T* images, const P* pattern, const C* mask, const bool* where, T* out, BatchShape shape,
                CompanionStride ps, CompanionStride ms, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t total = shape.samples * shape.planes * shape.length;
  if (shape.length % kWide == 0 && aligned(images) && aligned(pattern) && aligned(mask) && aligned(out)) {
    const int64_t packs = total / kWide;
    patch_kernel<T, P, C, kWide>
        <<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, pattern, mask, where, out, shape, ps, ms, packs);
  } else {
    patch_kernel<T, P, C, 1>
        <<<blocks_for(total, kThreads), kThreads, 0, stream>>>(images, pattern, mask, where, out, shape, ps, ms, total);
  }
}

#define BBFAST_PATCH(T, P, C)                                                                          \
  template void patch_cuda(const T*, const P*, const C*, const bool*, T*, BatchShape, CompanionStride, \
                           CompanionStride, CudaStream)
BBFAST_PATCH(uint8_t, uint8_t, float);
BBFAST_PATCH(uint8_t, float, float);
BBFAST_PATCH(__half, __half, float);
BBFAST_PATCH(__half, float, float);
BBFAST_PATCH(__nv_bfloat16, __nv_bfloat16, float);
BBFAST_PATCH(__nv_bfloat16, float, float);
BBFAST_PATCH(float, float, float);
BBFAST_PATCH(double, double, double);

}  // namespace bbfast

#include "common/cuda.cuh"
#include "ops/patch/patch.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

// A thread computes V neighbouring elements of one plane, of `together` samples; V divides the plane's length.
template <class T, class P, class C, int V>
__global__ void __launch_bounds__(kThreads)
    patch_kernel(const T* __restrict__ images, const P* __restrict__ pattern, const C* __restrict__ mask,
                 const bool* __restrict__ where, T* __restrict__ out, BatchShape shape, CompanionStride ps,
                 CompanionStride ms, int64_t packs, int64_t together) {
  const int64_t groups = (shape.samples + together - 1) / together;
  for (int64_t index = first_item(); index < groups * packs; index += item_stride()) {
    int64_t pack = 0;
    int64_t i = 0;
    const int64_t first = divide(index, packs, &pack) * together;
    const int64_t plane = divide(pack * V, shape.length, &i);
    const int64_t end = first + together < shape.samples ? first + together : shape.samples;
    const P* own_pattern = pattern + plane * ps.plane + i;
    const C* own_mask = mask + plane * ms.plane + i;
    Pack<P, V> p = load_pack<V>(own_pattern + first * ps.sample);
    Pack<C, V> a = load_pack<V>(own_mask + first * ms.sample);
    for (int64_t n = first; n < end; ++n) {
      const int64_t element = (n * packs + pack) * V;
      Pack<T, V> x = load_pack<V>(images + element);
      if (where == nullptr || where[n]) {
        if (ps.sample != 0 && n > first) p = load_pack<V>(own_pattern + n * ps.sample);
        if (ms.sample != 0 && n > first) a = load_pack<V>(own_mask + n * ms.sample);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          x.v[j] = finish<T>(load(x.v[j]) * (C(1) - a.v[j]) + static_cast<C>(load(p.v[j])) * a.v[j]);
        }
      }
      store_pack<V>(out + element, x);
    }
  }
}

template <class T, class P, class C, int V>
void launch(const T* images, const P* pattern, const C* mask, const bool* where, T* out, const BatchShape& shape,
            CompanionStride ps, CompanionStride ms, CudaStream stream) {
  const int64_t packs = shape.planes * shape.length / V;
  const int64_t together = samples_together(shape.samples, packs);
  const int64_t items = (shape.samples + together - 1) / together * packs;
  patch_kernel<T, P, C, V><<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, pattern, mask, where, out,
                                                                                 shape, ps, ms, packs, together);
}

}  // namespace

template <class T, class P, class C>
void patch_cuda(const T* images, const P* pattern, const C* mask, const bool* where, T* out, BatchShape shape,
                CompanionStride ps, CompanionStride ms, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  if (shape.length % kWide == 0 && aligned(images) && aligned(pattern) && aligned(mask) && aligned(out)) {
    launch<T, P, C, kWide>(images, pattern, mask, where, out, shape, ps, ms, stream);
  } else {
    launch<T, P, C, 1>(images, pattern, mask, where, out, shape, ps, ms, stream);
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

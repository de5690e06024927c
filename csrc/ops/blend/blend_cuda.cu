#include "common/cuda.cuh"
#include "ops/blend/blend.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

template <class T, class P, class A>
__device__ __forceinline__ T mixed(T x, P p, A a) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<A, C>) {
    return finish<T>(load(x) * (C(1) - a) + static_cast<C>(load(p)) * a);
  } else {
    // BackdoorBench: the image's part in double, the pattern's in float, their sum in double.
    const double rest = static_cast<double>(load(x)) * (1.0 - a);
    return finish_truncated(rest + static_cast<double>(load(p) * static_cast<float>(a)));
  }
}

// A thread computes V neighbouring elements of one plane; V divides the plane's length.
template <class T, class P, class A, int V>
__global__ void __launch_bounds__(kThreads)
    blend_kernel(const T* __restrict__ images, const P* __restrict__ pattern, Alpha<A> alpha,
                 const bool* __restrict__ where, T* __restrict__ out, BatchShape shape, CompanionStride ps,
                 int64_t packs) {
  for (int64_t index = first_item(); index < packs; index += item_stride()) {
    const int64_t element = index * V;
    int64_t i = 0;
    int64_t plane = 0;
    const int64_t item = divide(element, shape.length, &i);
    const int64_t n = divide(item, shape.planes, &plane);
    Pack<T, V> x = load_pack<V>(images + element);
    if (where == nullptr || where[n]) {
      const Pack<P, V> p = load_pack<V>(pattern + n * ps.sample + plane * ps.plane + i);
      if (alpha.elements != nullptr) {
        const Pack<A, V> a = load_pack<V>(alpha.elements + i);
#pragma unroll
        for (int j = 0; j < V; ++j) x.v[j] = mixed(x.v[j], p.v[j], a.v[j]);
      } else {
        const A a = alpha.samples != nullptr ? alpha.samples[n] : alpha.number;
#pragma unroll
        for (int j = 0; j < V; ++j) x.v[j] = mixed(x.v[j], p.v[j], a);
      }
    }
    store_pack<V>(out + element, x);
  }
}

}  // namespace

template <class T, class P, class A>
void blend_cuda(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out, BatchShape shape,
                CompanionStride ps, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t total = shape.samples * shape.planes * shape.length;
  if (shape.length % kWide == 0 && aligned(images) && aligned(pattern) && aligned(alpha.elements) && aligned(out)) {
    const int64_t packs = total / kWide;
    blend_kernel<T, P, A, kWide>
        <<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, pattern, alpha, where, out, shape, ps, packs);
  } else {
    blend_kernel<T, P, A, 1>
        <<<blocks_for(total, kThreads), kThreads, 0, stream>>>(images, pattern, alpha, where, out, shape, ps, total);
  }
}

#define BBFAST_BLEND(T, P, A) \
  template void blend_cuda(const T*, const P*, Alpha<A>, const bool*, T*, BatchShape, CompanionStride, CudaStream)
BBFAST_BLEND(uint8_t, uint8_t, float);
BBFAST_BLEND(uint8_t, float, float);
BBFAST_BLEND(uint8_t, uint8_t, double);
BBFAST_BLEND(uint8_t, float, double);
BBFAST_BLEND(__half, __half, float);
BBFAST_BLEND(__half, float, float);
BBFAST_BLEND(__nv_bfloat16, __nv_bfloat16, float);
BBFAST_BLEND(__nv_bfloat16, float, float);
BBFAST_BLEND(float, float, float);
BBFAST_BLEND(double, double, double);

}  // namespace bbfast

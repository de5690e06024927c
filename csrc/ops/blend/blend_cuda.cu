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

// A thread computes V neighbouring elements of one plane, of `together` samples; V divides the plane's length. kMap: a
// weight an element.
template <class T, class P, class A, int V, bool kMap>
__global__ void __launch_bounds__(kThreads)
    blend_kernel(const T* __restrict__ images, const P* __restrict__ pattern, Alpha<A> alpha,
                 const bool* __restrict__ where, T* __restrict__ out, BatchShape shape, CompanionStride ps,
                 int64_t packs, int64_t together) {
  const int64_t groups = (shape.samples + together - 1) / together;
  for (int64_t index = first_item(); index < groups * packs; index += item_stride()) {
    int64_t pack = 0;
    int64_t i = 0;
    const int64_t first = divide(index, packs, &pack) * together;
    const int64_t plane = divide(pack * V, shape.length, &i);
    const int64_t end = first + together < shape.samples ? first + together : shape.samples;
    const P* own = pattern + plane * ps.plane + i;
    Pack<P, V> p = load_pack<V>(own + first * ps.sample);
    Pack<A, kMap ? V : 1> a{alpha.number};
    if constexpr (kMap) a = load_pack<V>(alpha.elements + i);
    for (int64_t n = first; n < end; ++n) {
      const int64_t element = (n * packs + pack) * V;
      Pack<T, V> x = load_pack<V>(images + element);
      if (where == nullptr || where[n]) {
        if (ps.sample != 0 && n > first) p = load_pack<V>(own + n * ps.sample);
        if (!kMap && alpha.samples != nullptr) a.v[0] = alpha.samples[n];
#pragma unroll
        for (int j = 0; j < V; ++j) x.v[j] = mixed(x.v[j], p.v[j], a.v[kMap ? j : 0]);
      }
      store_pack<V>(out + element, x);
    }
  }
}

template <class T, class P, class A, int V>
void launch(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out, const BatchShape& shape,
            CompanionStride ps, CudaStream stream) {
  const int64_t packs = shape.planes * shape.length / V;
  const int64_t together = samples_together(shape.samples, packs);
  const int64_t items = (shape.samples + together - 1) / together * packs;
  const auto kernel = alpha.elements != nullptr ? blend_kernel<T, P, A, V, true> : blend_kernel<T, P, A, V, false>;
  kernel<<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, pattern, alpha, where, out, shape, ps, packs,
                                                               together);
}

}  // namespace

template <class T, class P, class A>
void blend_cuda(const T* images, const P* pattern, Alpha<A> alpha, const bool* where, T* out, BatchShape shape,
                CompanionStride ps, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  if (shape.length % kWide == 0 && aligned(images) && aligned(pattern) && aligned(alpha.elements) && aligned(out)) {
    launch<T, P, A, kWide>(images, pattern, alpha, where, out, shape, ps, stream);
  } else {
    launch<T, P, A, 1>(images, pattern, alpha, where, out, shape, ps, stream);
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

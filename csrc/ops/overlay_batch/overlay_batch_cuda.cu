#include "common/cuda.cuh"
#include "ops/overlay_batch/overlay_batch.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

template <class C>
struct Channels {
  C shift[kOverlayMaxChannels];
  C factor[kOverlayMaxChannels];
  C other_shift[kOverlayMaxChannels];
  C other_factor[kOverlayMaxChannels];
  C ceiling[kOverlayMaxChannels];
};

// v / 255, correctly rounded, in float without a division: see overlay_batch_cpu.cpp.
template <class C>
__device__ __forceinline__ C unit(uint8_t v) {
  if constexpr (std::is_same_v<C, float>) {
    constexpr float kHigh = 0x1.0101p-8f;
    constexpr float kLow = static_cast<float>(1.0 / 255.0 - static_cast<double>(kHigh));
    const float value = static_cast<float>(v);
    return value * kHigh + value * kLow;
  } else {
    return static_cast<C>(v) / C(255);
  }
}
template <class C>
__device__ __forceinline__ C unit(C v) {
  return v;
}

// A thread computes V neighbouring elements of one pair; V divides an image's length.
template <class T, class O, class C, int V>
__global__ void __launch_bounds__(kThreads)
    overlay_kernel(const T* __restrict__ images, const T* __restrict__ overlays, const int64_t* __restrict__ pairs,
                   O* __restrict__ out, OverlayShape s, Channels<C> scale, int64_t packs) {
  const int64_t length = s.channels * s.positions;
  for (int64_t item = first_item(); item < packs; item += item_stride()) {
    int64_t at = 0;
    const int64_t b = divide(item * V, length, &at);
    const int64_t image = pairs[2 * b];
    const int64_t overlay = pairs[2 * b + 1];
    BBFAST_DEVICE_CHECK(image >= 0 && image < s.images && overlay >= 0 && overlay < s.overlays,
                        "overlay_batch: pairs must lie in 0..%lld and 0..%lld, got (%lld, %lld) at position %lld",
                        static_cast<long long>(s.images - 1), static_cast<long long>(s.overlays - 1),
                        static_cast<long long>(image), static_cast<long long>(overlay), static_cast<long long>(b));
    const Pack<T, V> x = load_pack<V>(images + image * length + at);
    const Pack<T, V> r = load_pack<V>(overlays + overlay * length + at);
    int64_t c = 0;
    int64_t inside = 0;  // place in the plane
    if (s.channels_last) {
      divide(at, s.channels, &c);
    } else {
      c = divide(at, s.positions, &inside);
    }
    Pack<O, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const C own = (unit<C>(x.v[j]) - scale.shift[c]) * scale.factor[c];
      const C sum = (unit<C>(r.v[j]) - scale.other_shift[c]) * scale.other_factor[c] + own;
      result.v[j] = store<O>(sum > scale.ceiling[c] ? scale.ceiling[c] : sum);
      if (s.channels_last) {
        if (++c == s.channels) c = 0;
      } else if (++inside == s.positions && j + 1 < V) {
        inside = 0;
        ++c;
      }
    }
    store_pack<V>(out + item * V, result);
  }
}

}  // namespace

template <class T, class O, class C>
void overlay_batch_cuda(const T* images, const T* overlays, const int64_t* pairs, O* out, OverlayShape shape,
                        const OverlayScale<C>& scale, CudaStream stream) {
  Channels<C> channels;
  for (int64_t c = 0; c < shape.channels; ++c) {
    channels.shift[c] = scale.shift[c];
    channels.factor[c] = scale.factor[c];
    channels.other_shift[c] = scale.other_shift[c];
    channels.other_factor[c] = scale.other_factor[c];
    channels.ceiling[c] = scale.ceiling.empty() ? static_cast<C>(HUGE_VAL) : scale.ceiling[c];
  }
  constexpr int kWide = 16 / sizeof(O);
  const int64_t total = shape.count * shape.length();
  if (shape.length() % kWide == 0 && aligned(images) && aligned(overlays) && aligned(out)) {
    const int64_t packs = total / kWide;
    overlay_kernel<T, O, C, kWide>
        <<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, overlays, pairs, out, shape, channels, packs);
  } else {
    overlay_kernel<T, O, C, 1>
        <<<blocks_for(total, kThreads), kThreads, 0, stream>>>(images, overlays, pairs, out, shape, channels, total);
  }
}

#define BBFAST_OVERLAY(T, O, C)                                                                                  \
  template void overlay_batch_cuda(const T*, const T*, const int64_t*, O*, OverlayShape, const OverlayScale<C>&, \
                                   CudaStream)
BBFAST_OVERLAY(uint8_t, float, float);
BBFAST_OVERLAY(uint8_t, __half, float);
BBFAST_OVERLAY(uint8_t, __nv_bfloat16, float);
BBFAST_OVERLAY(uint8_t, double, double);
BBFAST_OVERLAY(float, float, float);
BBFAST_OVERLAY(float, __half, float);
BBFAST_OVERLAY(float, __nv_bfloat16, float);
BBFAST_OVERLAY(double, double, double);

}  // namespace bbfast

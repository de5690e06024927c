#include "common/cuda.cuh"
#include "ops/spectral_add/spectral_add.h"
#include "ops/spectral_add/ycrcb.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

template <class T, class C>
__device__ __forceinline__ T finish_as(C value, ToByte to_byte) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (to_byte == ToByte::kTruncate) return finish_truncated(value);
    if (to_byte == ToByte::kWrap) {
      return static_cast<uint8_t>(__float2int_rz(fminf(fmaxf(value, -16777216.0f), 16777216.0f)));
    }
  }
  return finish<T>(value);
}

// A walk along a row of the pattern that begins anew at its end.
template <class C>
struct TileRow {
  const C* values;
  int64_t width;
  int64_t at;

  __device__ __forceinline__ TileRow(const C* pattern, const SpectralShape& shape, int64_t row, int64_t column)
      : width(shape.tile_width) {
    int64_t top = 0;
    divide(row, shape.tile_height, &top);
    divide(column, width, &at);
    values = pattern + top * width;
  }

  __device__ __forceinline__ void step() { at = at + 1 == width ? 0 : at + 1; }
};

// A thread computes V neighbouring elements of one row, of `together` samples: of one channel, or of pixels with all
// channels.
template <class T, class C, int V, bool kLast>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* __restrict__ images, const C* __restrict__ pattern, const bool* __restrict__ where,
               T* __restrict__ out, SpectralGains<C> gains, ToByte to_byte, SpectralShape shape, int64_t packs,
               int64_t together) {
  const int64_t pitch = kLast ? shape.width * shape.channels : shape.width;
  const int64_t groups = (shape.samples + together - 1) / together;
  for (int64_t index = first_item(); index < groups * packs; index += item_stride()) {
    int64_t pack = 0;
    int64_t place = 0;
    int64_t row = 0;
    int64_t channel = 0;
    const int64_t first = divide(index, packs, &pack) * together;
    const int64_t plane = divide(divide(pack * V, pitch, &place), shape.height, &row);
    const int64_t column = kLast ? divide(place, shape.channels, &channel) : place;
    if (!kLast) channel = plane;
    TileRow<C> tile(pattern, shape, row, column);
    C delta[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      delta[j] = gains.of[channel] * tile.values[tile.at];
      if (!kLast || ++channel == shape.channels) {
        if (kLast) channel = 0;
        tile.step();
      }
    }
    const int64_t end = first + together < shape.samples ? first + together : shape.samples;
    for (int64_t n = first; n < end; ++n) {
      const int64_t element = (n * packs + pack) * V;
      Pack<T, V> x = load_pack<V>(images + element);
      if (where == nullptr || where[n]) {
#pragma unroll
        for (int j = 0; j < V; ++j) x.v[j] = finish_as<T>(load(x.v[j]) + delta[j], to_byte);
      }
      store_pack<V>(out + element, x);
    }
  }
}

// A thread computes V neighbouring pixels of one row, of `together` samples; V divides the width.
template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads)
    ycrcb_kernel(const uint8_t* __restrict__ images, const float* __restrict__ pattern, const bool* __restrict__ where,
                 uint8_t* __restrict__ out, SpectralGains<float> gains, ToByte to_byte, SpectralShape shape,
                 int64_t packs, int64_t together) {
  const int64_t pixels = shape.height * shape.width;
  const int64_t groups = (shape.samples + together - 1) / together;
  for (int64_t index = first_item(); index < groups * packs; index += item_stride()) {
    int64_t pack = 0;
    int64_t column = 0;
    const int64_t first = divide(index, packs, &pack) * together;
    const int64_t row = divide(pack * V, shape.width, &column);
    TileRow<float> tile(pattern, shape, row, column);
    float values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      values[j] = tile.values[tile.at];
      tile.step();
    }
    const int64_t next = kLast ? V : pixels;  // from one to the next of three packs
    const int64_t end = first + together < shape.samples ? first + together : shape.samples;
    for (int64_t n = first; n < end; ++n) {
      const int64_t base = n * 3 * pixels + (kLast ? 3 : 1) * pack * V;
      Pack<uint8_t, V> x[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) x[c] = load_pack<V>(images + base + c * next);
      if (where == nullptr || where[n]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          // Three packs of interleaved pixels: their element e stands in pack e / V, at place e % V.
          uint8_t& red = kLast ? x[3 * j / V].v[3 * j % V] : x[0].v[j];
          uint8_t& green = kLast ? x[(3 * j + 1) / V].v[(3 * j + 1) % V] : x[1].v[j];
          uint8_t& blue = kLast ? x[(3 * j + 2) / V].v[(3 * j + 2) % V] : x[2].v[j];
          const Triple from = rgb_to_ycrcb(red, green, blue);
          const Triple to =
              ycrcb_to_rgb(finish_as<uint8_t>(static_cast<float>(from.a) + gains.of[0] * values[j], to_byte),
                           finish_as<uint8_t>(static_cast<float>(from.b) + gains.of[1] * values[j], to_byte),
                           finish_as<uint8_t>(static_cast<float>(from.c) + gains.of[2] * values[j], to_byte));
          red = static_cast<uint8_t>(to.a);
          green = static_cast<uint8_t>(to.b);
          blue = static_cast<uint8_t>(to.c);
        }
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) store_pack<V>(out + base + c * next, x[c]);
    }
  }
}

template <class T, class C, int V>
void launch_add(const T* images, const C* pattern, const bool* where, T* out, const SpectralGains<C>& gains,
                ToByte to_byte, const SpectralShape& shape, CudaStream stream) {
  const int64_t packs = shape.channels * shape.height * shape.width / V;
  const int64_t together = samples_together(shape.samples, packs);
  const int64_t items = (shape.samples + together - 1) / together * packs;
  const auto kernel = shape.channels_last ? add_kernel<T, C, V, true> : add_kernel<T, C, V, false>;
  kernel<<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, pattern, where, out, gains, to_byte, shape,
                                                               packs, together);
}

template <int V>
void launch_ycrcb(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                  const SpectralGains<float>& gains, ToByte to_byte, const SpectralShape& shape, CudaStream stream) {
  const int64_t packs = shape.height * shape.width / V;
  const int64_t together = samples_together(shape.samples, packs);
  const int64_t items = (shape.samples + together - 1) / together * packs;
  const auto kernel = shape.channels_last ? ycrcb_kernel<V, true> : ycrcb_kernel<V, false>;
  kernel<<<blocks_for(items, kThreads), kThreads, 0, stream>>>(images, pattern, where, out, gains, to_byte, shape,
                                                               packs, together);
}

}  // namespace

template <class T, class C>
void spectral_add_cuda(const T* images, const C* pattern, const bool* where, T* out, SpectralGains<C> gains,
                       ToByte to_byte, SpectralShape shape, CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t pitch = shape.channels_last ? shape.width * shape.channels : shape.width;
  if (pitch % kWide == 0 && aligned(images) && aligned(out)) {
    launch_add<T, C, kWide>(images, pattern, where, out, gains, to_byte, shape, stream);
  } else {
    launch_add<T, C, 1>(images, pattern, where, out, gains, to_byte, shape, stream);
  }
}

void spectral_ycrcb_cuda(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                         SpectralGains<float> gains, ToByte to_byte, SpectralShape shape, CudaStream stream) {
  constexpr int kWide = 16;
  if (shape.width % kWide == 0 && aligned(images) && aligned(out)) {
    launch_ycrcb<kWide>(images, pattern, where, out, gains, to_byte, shape, stream);
  } else {
    launch_ycrcb<1>(images, pattern, where, out, gains, to_byte, shape, stream);
  }
}

template void spectral_add_cuda(const uint8_t*, const float*, const bool*, uint8_t*, SpectralGains<float>, ToByte,
                                SpectralShape, CudaStream);
template void spectral_add_cuda(const __half*, const float*, const bool*, __half*, SpectralGains<float>, ToByte,
                                SpectralShape, CudaStream);
template void spectral_add_cuda(const __nv_bfloat16*, const float*, const bool*, __nv_bfloat16*, SpectralGains<float>,
                                ToByte, SpectralShape, CudaStream);
template void spectral_add_cuda(const float*, const float*, const bool*, float*, SpectralGains<float>, ToByte,
                                SpectralShape, CudaStream);
template void spectral_add_cuda(const double*, const double*, const bool*, double*, SpectralGains<double>, ToByte,
                                SpectralShape, CudaStream);

}  // namespace bbfast

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

// A thread computes V neighbouring elements of one row: of one channel, or of pixels with all channels.
template <class T, class C, int V, bool kLast>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* __restrict__ images, const C* __restrict__ pattern, const bool* __restrict__ where,
               T* __restrict__ out, SpectralGains<C> gains, ToByte to_byte, SpectralShape shape, int64_t packs) {
  const int64_t pitch = kLast ? shape.width * shape.channels : shape.width;
  const int64_t planes = kLast ? 1 : shape.channels;
  for (int64_t index = first_item(); index < packs; index += item_stride()) {
    const int64_t element = index * V;
    int64_t place = 0;
    int64_t row = 0;
    int64_t channel = 0;
    const int64_t line = divide(element, pitch, &place);
    const int64_t plane = divide(line, shape.height, &row);
    const int64_t n = divide(plane, planes, &channel);
    Pack<T, V> x = load_pack<V>(images + element);
    if (where == nullptr || where[n]) {
      const int64_t column = kLast ? divide(place, shape.channels, &channel) : place;
      TileRow<C> tile(pattern, shape, row, column);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x.v[j] = finish_as<T>(load(x.v[j]) + gains.of[channel] * tile.values[tile.at], to_byte);
        if (!kLast || ++channel == shape.channels) {
          if (kLast) channel = 0;
          tile.step();
        }
      }
    }
    store_pack<V>(out + element, x);
  }
}

// A thread computes V neighbouring pixels of one row; V divides the width.
template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads)
    ycrcb_kernel(const uint8_t* __restrict__ images, const float* __restrict__ pattern, const bool* __restrict__ where,
                 uint8_t* __restrict__ out, SpectralGains<float> gains, ToByte to_byte, SpectralShape shape,
                 int64_t packs) {
  const int64_t pixels = shape.height * shape.width;
  for (int64_t index = first_item(); index < packs; index += item_stride()) {
    int64_t pixel = 0;
    int64_t column = 0;
    const int64_t n = divide(index * V, pixels, &pixel);
    const int64_t row = divide(pixel, shape.width, &column);
    const int64_t base = n * 3 * pixels + (kLast ? 3 * pixel : pixel);
    const int64_t next = kLast ? V : pixels;  // from one to the next of three packs
    Pack<uint8_t, V> x[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) x[c] = load_pack<V>(images + base + c * next);
    if (where == nullptr || where[n]) {
      TileRow<float> tile(pattern, shape, row, column);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        // Three packs of interleaved pixels: their element e stands in pack e / V, at place e % V.
        uint8_t& red = kLast ? x[3 * j / V].v[3 * j % V] : x[0].v[j];
        uint8_t& green = kLast ? x[(3 * j + 1) / V].v[(3 * j + 1) % V] : x[1].v[j];
        uint8_t& blue = kLast ? x[(3 * j + 2) / V].v[(3 * j + 2) % V] : x[2].v[j];
        const float t = tile.values[tile.at];
        const Triple from = rgb_to_ycrcb(red, green, blue);
        const Triple to = ycrcb_to_rgb(finish_as<uint8_t>(static_cast<float>(from.a) + gains.of[0] * t, to_byte),
                                       finish_as<uint8_t>(static_cast<float>(from.b) + gains.of[1] * t, to_byte),
                                       finish_as<uint8_t>(static_cast<float>(from.c) + gains.of[2] * t, to_byte));
        red = static_cast<uint8_t>(to.a);
        green = static_cast<uint8_t>(to.b);
        blue = static_cast<uint8_t>(to.c);
        tile.step();
      }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) store_pack<V>(out + base + c * next, x[c]);
  }
}

template <class T, class C, int V>
void launch_add(const T* images, const C* pattern, const bool* where, T* out, const SpectralGains<C>& gains,
                ToByte to_byte, const SpectralShape& shape, CudaStream stream) {
  const int64_t packs = shape.samples * shape.channels * shape.height * shape.width / V;
  const auto kernel = shape.channels_last ? add_kernel<T, C, V, true> : add_kernel<T, C, V, false>;
  kernel<<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, pattern, where, out, gains, to_byte, shape,
                                                               packs);
}

template <int V>
void launch_ycrcb(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                  const SpectralGains<float>& gains, ToByte to_byte, const SpectralShape& shape, CudaStream stream) {
  const int64_t packs = shape.samples * shape.height * shape.width / V;
  const auto kernel = shape.channels_last ? ycrcb_kernel<V, true> : ycrcb_kernel<V, false>;
  kernel<<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, pattern, where, out, gains, to_byte, shape,
                                                               packs);
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

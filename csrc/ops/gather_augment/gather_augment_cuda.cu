#include "common/cuda.cuh"
#include "ops/gather_augment/gather_augment.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTableChannels = 8;  // up to here a block keeps all values in shared memory
constexpr unsigned kTableBlocks = 1024;

template <class C>
struct Channels {
  C mean[kGatherMaxChannels];
  C std[kGatherMaxChannels];
};

template <class O, class C>
__device__ __forceinline__ O value_of(uint8_t v, const Channels<C>& scale, int64_t c) {
  if constexpr (std::is_same_v<O, uint8_t>) {
    return v;
  } else {
    return store<O>((static_cast<C>(v) / C(255) - scale.mean[c]) / scale.std[c]);
  }
}

// Where a sample comes from.
struct Source {
  const uint8_t* image;
  int64_t top, left;
  bool flip;
};

__device__ __forceinline__ Source source_of(const uint8_t* images, const int64_t* index, const int64_t* offset,
                                            const bool* flip, const GatherShape& s, int64_t b) {
  const int64_t at = index[b];
  BBFAST_DEVICE_CHECK(at >= 0 && at < s.images, "gather_augment: index must lie in 0..%lld, got %lld at position %lld",
                      static_cast<long long>(s.images - 1), static_cast<long long>(at), static_cast<long long>(b));
  Source source{images + at * s.image_step, 0, 0, flip != nullptr && flip[b]};
  if (offset != nullptr) {
    const int64_t top = offset[2 * b];
    const int64_t left = offset[2 * b + 1];
    BBFAST_DEVICE_CHECK(top >= 0 && top <= 2 * s.padding && left >= 0 && left <= 2 * s.padding,
                        "gather_augment: offset must lie in 0..%lld, got (%lld, %lld) at sample %lld",
                        static_cast<long long>(2 * s.padding), static_cast<long long>(top),
                        static_cast<long long>(left), static_cast<long long>(b));
    source.top = top - s.padding;
    source.left = left - s.padding;
  }
  return source;
}

// A thread computes V neighbouring elements of a row of the result; V divides the row. It finds the place of the first
// by division and walks to the others. With `kTable` a block first fills a table of the 256 values of every channel,
// and then works on many pieces.
template <class O, class C, int V, bool kTable>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint8_t* __restrict__ images, const int64_t* __restrict__ index,
                  const int64_t* __restrict__ offset, const bool* __restrict__ flip, O* __restrict__ out, GatherShape s,
                  Channels<C> scale, int64_t packs) {
  extern __shared__ __align__(16) unsigned char shared[];
  O* table = reinterpret_cast<O*>(shared);
  if constexpr (kTable) {
    for (int64_t i = threadIdx.x; i < s.channels * 256; i += blockDim.x) {
      table[i] = value_of<O>(static_cast<uint8_t>(i & 255), scale, i >> 8);
    }
    __syncthreads();
  }
  for (int64_t item = first_item(); item < packs; item += item_stride()) {
    int64_t b = 0;
    int64_t c = 0;
    int64_t y = 0;
    int64_t x = 0;
    if (s.channels_last) {
      const int64_t line = divide(divide(item * V, s.channels, &c), s.width, &x);
      b = divide(line, s.height, &y);
    } else {
      const int64_t plane = divide(divide(item * V, s.width, &x), s.height, &y);
      b = divide(plane, s.channels, &c);
    }
    const Source source = source_of(images, index, offset, flip, s, b);
    const int64_t row = y + source.top;
    const bool row_inside = row >= 0 && row < s.height;
    const int64_t step = source.flip ? -1 : 1;
    int64_t column = (source.flip ? s.width - 1 - x : x) + source.left;
    int64_t at = c * s.channel_step + row * s.row_step + column * s.column_step;
    // To the next pixel, from the last channel to the first where channels are neighbours.
    const int64_t across = step * s.column_step - (s.channels_last ? (s.channels - 1) * s.channel_step : 0);
    Pack<O, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool inside = row_inside && column >= 0 && column < s.width;
      const uint8_t v = inside ? source.image[at] : uint8_t{0};
      pack.v[j] = kTable ? table[c * 256 + v] : value_of<O>(v, scale, c);
      if (s.channels_last && ++c < s.channels) {
        at += s.channel_step;
      } else {
        if (s.channels_last) c = 0;
        column += step;
        at += across;
      }
    }
    store_pack<V>(out + item * V, pack);
  }
}

template <class O, class C, int V>
void launch(const uint8_t* images, const int64_t* index, const int64_t* offset, const bool* flip, O* out,
            const GatherShape& s, const Channels<C>& scale, CudaStream stream) {
  const int64_t packs = s.count * s.channels * s.height * s.width / V;
  const unsigned blocks = blocks_for(packs, kThreads);
  if (!std::is_same_v<O, uint8_t> && s.channels <= kTableChannels) {
    const unsigned fewer = blocks < kTableBlocks ? blocks : kTableBlocks;
    const size_t bytes = static_cast<size_t>(s.channels) * 256 * sizeof(O);
    gather_kernel<O, C, V, true><<<fewer, kThreads, bytes, stream>>>(images, index, offset, flip, out, s, scale, packs);
  } else {
    gather_kernel<O, C, V, false><<<blocks, kThreads, 0, stream>>>(images, index, offset, flip, out, s, scale, packs);
  }
}

}  // namespace

template <class O, class C>
void gather_augment_cuda(const uint8_t* images, const int64_t* index, const int64_t* offset, const bool* flip,
                         const C* mean, const C* std, O* out, GatherShape shape, CudaStream stream) {
  Channels<C> scale;
  for (int64_t c = 0; c < shape.channels; ++c) {
    scale.mean[c] = mean[c];
    scale.std[c] = std[c];
  }
  constexpr int kWide = 16 / sizeof(O) < 8 ? 16 / sizeof(O) : 8;
  constexpr int kNarrow = kWide < 4 ? kWide : 4;
  const int64_t row = shape.channels_last ? shape.width * shape.channels : shape.width;
  if (row % kWide == 0 && aligned(out)) {
    launch<O, C, kWide>(images, index, offset, flip, out, shape, scale, stream);
  } else if (row % kNarrow == 0 && aligned(out)) {
    launch<O, C, kNarrow>(images, index, offset, flip, out, shape, scale, stream);
  } else {
    launch<O, C, 1>(images, index, offset, flip, out, shape, scale, stream);
  }
}

#define BBFAST_GATHER(O, C)                                                                                          \
  template void gather_augment_cuda(const uint8_t*, const int64_t*, const int64_t*, const bool*, const C*, const C*, \
                                    O*, GatherShape, CudaStream)
BBFAST_GATHER(uint8_t, float);
BBFAST_GATHER(__half, float);
BBFAST_GATHER(__nv_bfloat16, float);
BBFAST_GATHER(float, float);
BBFAST_GATHER(double, double);

}  // namespace bbfast

#include <cfloat>

#include "common/cuda.cuh"
#include "ops/gram_powers/gram_powers.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;   // a block computes one kTile x kTile piece of one sample's matrix
constexpr int kChunk = 16;  // positions in shared memory at a time
constexpr int kSide = 16;   // kSide x kSide threads, each with kOwn x kOwn sums
constexpr int kOwn = kTile / kSide;
constexpr int64_t kMaxBlocksY = 65535;

template <class T>
__device__ __forceinline__ Compute<T> value_at(const T* __restrict__ features, const GramShape& s, int64_t n, int64_t c,
                                               int64_t position) {
  int64_t column = 0;
  const int64_t row = divide(position, s.width, &column);
  return load(features[n * s.sample_step + c * s.channel_step + row * s.row_step + column * s.column_step]);
}

// The exponent of the largest magnitude of each channel, a warp a channel; 0 for one without a finite one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exponent_kernel(const T* __restrict__ features, int32_t* __restrict__ exponents, GramShape s) {
  using C = Compute<T>;
  constexpr C kLargest = sizeof(C) == 8 ? static_cast<C>(DBL_MAX) : static_cast<C>(FLT_MAX);
  const int lane = threadIdx.x & 31;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; item < s.samples * s.channels;
       item += step) {
    int64_t c = 0;
    const int64_t n = divide(item, s.channels, &c);
    C top = 0;
    for (int64_t i = lane; i < s.height * s.width; i += 32) {
      const C v = value_at(features, s, n, c, i);
      const C magnitude = v < C(0) ? -v : v;
      top = magnitude > top ? magnitude : top;
    }
    for (int other = 16; other > 0; other /= 2) {
      const C theirs = __shfl_xor_sync(0xFFFFFFFFu, top, other);
      top = theirs > top ? theirs : top;
    }
    int exponent = 0;
    if (top <= kLargest) frexp(top, &exponent);
    if (lane == 0) exponents[item] = exponent;
  }
}

// sign(x) |x 2^-shift|^(1/order); the exponent is divided apart from the mantissa, which keeps the small numbers.
template <class C>
__device__ __forceinline__ C signed_root(C x, int shift, int order) {
  const C magnitude = fabs(x);
  if (order == 1) return ldexp(x, -shift);
  if (!(magnitude > C(0)) || isinf(magnitude)) return x;
  int exponent = 0;
  const C mantissa = frexp(magnitude, &exponent);
  exponent -= shift;
  const int quotient = (exponent - (exponent < 0 ? order - 1 : 0)) / order;  // rounded down
  const C root = pow(ldexp(mantissa, exponent - quotient * order), C(1) / static_cast<C>(order));
  return copysign(ldexp(root, quotient), x);
}

// How the channels of a launch are shifted and raised.
struct Raise {
  int order;
  int power;
  int peak_bits;
  int most_bits;
};

template <class T>
__device__ __forceinline__ void read_chunk(const T* __restrict__ features, const int32_t* exponents, const GramShape& s,
                                           const Raise& raise, int64_t n, int64_t from, int64_t position,
                                           Compute<T> (*to)[kTile + 1]) {
  using C = Compute<T>;
  for (int i = threadIdx.x; i < kChunk * kTile; i += kThreads) {
    // Neighbouring threads read neighbours in memory: channels where these are dense, positions elsewhere.
    const int at = s.channel_step == 1 ? i / kTile : i % kChunk;
    const int own = s.channel_step == 1 ? i % kTile : i / kChunk;
    const int64_t c = from + own;
    C result = 0;
    if (c < s.channels && position + at < s.height * s.width) {
      const int shift = min(raise.peak_bits - exponents[n * s.channels + c], raise.most_bits);
      const C v = ldexp(value_at(features, s, n, c, position + at), shift);
      result = v;
      for (int p = 1; p < raise.power; ++p) result *= v;
    }
    to[at][own] = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const T* __restrict__ features, const int32_t* __restrict__ exponents, T* __restrict__ out, GramShape s,
                Raise raise, int64_t place, int64_t tiles) {
  using C = Compute<T>;
  __shared__ C a[kChunk][kTile + 1];
  __shared__ C b[kChunk][kTile + 1];
  int64_t pair = blockIdx.x;
  int64_t tile = 0;
  while (pair >= tiles - tile) pair -= tiles - tile++;
  const int64_t top = tile * kTile;
  const int64_t left = (tile + pair) * kTile;
  const int row = threadIdx.x / kSide;
  const int column = threadIdx.x % kSide;
  for (int64_t n = blockIdx.y; n < s.samples; n += gridDim.y) {
    C sums[kOwn][kOwn] = {};
    for (int64_t position = 0; position < s.height * s.width; position += kChunk) {
      read_chunk(features, exponents, s, raise, n, top, position, a);
      read_chunk(features, exponents, s, raise, n, left, position, b);
      __syncthreads();
#pragma unroll
      for (int p = 0; p < kChunk; ++p) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums[i][j] += a[p][row + i * kSide] * b[p][column + j * kSide];
        }
      }
      __syncthreads();
    }
    T* to = out + (n * s.orders + place) * (s.channels * (s.channels + 1) / 2);
    const int32_t* exponent = exponents + n * s.channels;
    for (int i = 0; i < kOwn; ++i) {
      const int64_t y = top + row + i * kSide;
      if (y >= s.channels) continue;
      T* line = to + y * s.channels - y * (y - 1) / 2 - y;  // entry (y, x) of the triangle is line[x]
      for (int j = 0; j < kOwn; ++j) {
        const int64_t x = left + column + j * kSide;
        if (x < y || x >= s.channels) continue;
        const int shift =
            min(raise.peak_bits - exponent[y], raise.most_bits) + min(raise.peak_bits - exponent[x], raise.most_bits);
        line[x] = store<T>(signed_root(sums[i][j], raise.power * shift, raise.order));
      }
    }
  }
}

}  // namespace

template <class T>
void gram_powers_cuda(const T* features, const int64_t* orders, T* out, int32_t* exponents, GramShape s,
                      CudaStream stream) {
  constexpr int kTop = sizeof(Compute<T>) == 8 ? DBL_MAX_EXP - 1 : FLT_MAX_EXP - 1;
  exponent_kernel<T>
      <<<blocks_for(s.samples * s.channels * 32, kThreads), kThreads, 0, stream>>>(features, exponents, s);
  const int64_t tiles = (s.channels + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(tiles * (tiles + 1) / 2),
                  static_cast<unsigned>(s.samples < kMaxBlocksY ? s.samples : kMaxBlocksY));
  for (int64_t place = 0; place < s.orders; ++place) {
    const int64_t bits = gram_peak_bits(orders[place], s.height * s.width, s.compat, kTop);
    const int order = static_cast<int>(orders[place]);
    const Raise raise{order, s.compat ? 1 : order, static_cast<int>(bits), kTop - 1};
    gram_kernel<T><<<grid, kThreads, 0, stream>>>(features, exponents, out, s, raise, place, tiles);
  }
}

#define BBFAST_GRAM(T) template void gram_powers_cuda(const T*, const int64_t*, T*, int32_t*, GramShape, CudaStream)
BBFAST_GRAM(float);
BBFAST_GRAM(double);
BBFAST_GRAM(__half);
BBFAST_GRAM(__nv_bfloat16);

}  // namespace bbfast

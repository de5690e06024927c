// Helpers of CUDA kernels: element types, rounding, grid sizes, checks on the device. CUDA headers only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace bbfast {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float load(float value) {
  return value;
}
__device__ __forceinline__ double load(double value) {
  return value;
}
__device__ __forceinline__ float load(uint8_t value) {
  return static_cast<float>(value);
}
__device__ __forceinline__ float load(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float load(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class T>
__device__ __forceinline__ T store(Compute<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

// To the images' type, as `finish` of common/mix.h does on the CPU: uint8 is clamped and rounded half to even, NaN
// becomes 0.
template <class T>
__device__ __forceinline__ T finish(Compute<T> value) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(value, 0.0f), 255.0f)));
  } else {
    return store<T>(value);
  }
}

__device__ __forceinline__ uint8_t finish_truncated(float value) {
  return static_cast<uint8_t>(__float2int_rz(fminf(fmaxf(value, 0.0f), 255.0f)));
}

__device__ __forceinline__ uint8_t finish_truncated(double value) {
  return static_cast<uint8_t>(__double2int_rz(fmin(fmax(value, 0.0), 255.0)));
}

// V neighbours, moved in pieces of 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Quotient and remainder of numbers that usually fit 32 bits, where division costs a third.
__device__ __forceinline__ int64_t divide(int64_t value, int64_t divisor, int64_t* rest) {
  if ((static_cast<uint64_t>(value) | static_cast<uint64_t>(divisor)) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(value) / static_cast<uint32_t>(divisor);
    *rest = static_cast<uint32_t>(value) - quotient * static_cast<uint32_t>(divisor);
    return quotient;
  }
  const int64_t quotient = value / divisor;
  *rest = value - quotient * divisor;
  return quotient;
}

// A broken promise about values (an index outside its range) that only the device can see. As in PyTorch's own kernels
// the message is printed and the kernel is stopped; nothing is read or written out of bounds.
#define BBFAST_DEVICE_CHECK(condition, format, ...) \
  do {                                              \
    if (!(condition)) {                             \
      printf("bbfast: " format "\n", __VA_ARGS__);  \
      __trap();                                     \
    }                                               \
  } while (0)

// Blocks for `items` of one thread each, capped: kernels walk the rest in a grid-stride loop.
inline unsigned blocks_for(int64_t items, int threads) {
  constexpr int64_t kCap = 1 << 20;
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < kCap ? blocks : kCap));
}

// Samples that a thread takes one after the other, where what goes with the images is the same for all: it is read and
// its place found once. One until there are threads enough to fill a large device.
inline int64_t samples_together(int64_t samples, int64_t packs) {
  constexpr int64_t kFilling = 1 << 19;
  constexpr int64_t kMost = 8;
  const int64_t together = samples * packs / kFilling;
  return together < 1 ? 1 : (together < kMost ? together : kMost);
}

__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t item_stride() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace bbfast

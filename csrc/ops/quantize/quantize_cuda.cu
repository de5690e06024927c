#include <cstring>

#include "common/cuda.cuh"
#include "ops/quantize/affine.h"
#include "ops/quantize/quantize.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;

struct Rule {
  ByteLevels bytes;
  Levels levels;
  bool affine;
};

template <class T>
__device__ __forceinline__ T leveled(T x, const Levels& levels) {
  using C = Compute<T>;
  const C steps = static_cast<C>(levels.steps);
  if constexpr (!std::is_same_v<T, uint8_t>) {
    return store<T>(rint(load(x) * steps) / steps);
  } else {
    const float level = rintf(load(x) * static_cast<float>(levels.steps / 255.0)) * 255.0f / steps;
    return levels.truncate ? finish_truncated(level) : finish<uint8_t>(level);
  }
}

// Two bytes in the halves of a word, each (byte * factor + offset) >> shift; find_affine saw to it that no half
// overflows.
__device__ __forceinline__ uint32_t apply(uint32_t two, const Affine& a) {
  const uint32_t kept = (0xFFFFu >> a.shift) * 0x10001u;
  return ((two * a.factor + a.offset * 0x10001u) >> a.shift) & kept;
}

__device__ __forceinline__ uint32_t leveled_word(uint32_t four, const ByteLevels& bytes) {
  const uint32_t even = apply(apply(four & 0x00FF00FFu, bytes.step), bytes.level);
  const uint32_t odd = apply(apply((four >> 8) & 0x00FF00FFu, bytes.step), bytes.level);
  return even | (odd << 8);
}

// A thread computes V neighbouring elements of one sample; V divides the length of a sample.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ images, const bool* __restrict__ where, T* __restrict__ out, int64_t length,
                    Rule rule, int64_t packs) {
  for (int64_t index = first_item(); index < packs; index += item_stride()) {
    const int64_t element = index * V;
    int64_t i = 0;
    Pack<T, V> x = load_pack<V>(images + element);
    if (where == nullptr || where[divide(element, length, &i)]) {
      if constexpr (std::is_same_v<T, uint8_t> && V == 16) {
        if (rule.affine) {
          uint32_t words[4];
          memcpy(words, x.v, sizeof(words));
#pragma unroll
          for (int j = 0; j < 4; ++j) words[j] = leveled_word(words[j], rule.bytes);
          memcpy(x.v, words, sizeof(words));
          store_pack<V>(out + element, x);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) x.v[j] = leveled(x.v[j], rule.levels);
    }
    store_pack<V>(out + element, x);
  }
}

}  // namespace

template <class T>
void quantize_cuda(const T* images, const bool* where, T* out, int64_t samples, int64_t length, Levels levels,
                   CudaStream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t total = samples * length;
  Rule rule{{}, levels, false};
  if (std::is_same_v<T, uint8_t>) rule.bytes = find_byte_levels(levels.steps, levels.truncate);
  rule.affine = rule.bytes.found();
  if (length % kWide == 0 && aligned(images) && aligned(out)) {
    const int64_t packs = total / kWide;
    quantize_kernel<T, kWide>
        <<<blocks_for(packs, kThreads), kThreads, 0, stream>>>(images, where, out, length, rule, packs);
  } else {
    quantize_kernel<T, 1>
        <<<blocks_for(total, kThreads), kThreads, 0, stream>>>(images, where, out, length, rule, total);
  }
}

#define BBFAST_QUANTIZE(T) template void quantize_cuda(const T*, const bool*, T*, int64_t, int64_t, Levels, CudaStream)
BBFAST_QUANTIZE(uint8_t);
BBFAST_QUANTIZE(__half);
BBFAST_QUANTIZE(__nv_bfloat16);
BBFAST_QUANTIZE(float);
BBFAST_QUANTIZE(double);

}  // namespace bbfast

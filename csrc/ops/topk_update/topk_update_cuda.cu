#include "common/cuda.cuh"
#include "ops/topk_update/topk_update.h"

namespace bbfast {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = kThreads / 32;  // a warp a column
constexpr int kRows = 32;                // a lane a row
constexpr unsigned kAll = 0xFFFFFFFFu;

template <class C>
__device__ __forceinline__ bool better(C value, int64_t id, C other, int64_t other_id) {
  // A free place, -1, is the largest id.
  return value > other ||
         (value == other && static_cast<unsigned long long>(id) < static_cast<unsigned long long>(other_id));
}

// Puts one value in its place of a sorted list; all lanes of a warp take part with the same arguments.
template <class T>
__device__ void insert(T* values, int64_t* ids, int64_t kept, Compute<T> value, int64_t id, int lane) {
  int64_t place = 0;
  for (int64_t i = 0; i < kept; i += 32) {
    const bool ahead =
        i + lane < kept && better(static_cast<Compute<T>>(load(values[i + lane])), ids[i + lane], value, id);
    const int found = __popc(__ballot_sync(kAll, ahead));
    place += found;
    if (found < 32) break;
  }
  if (place >= kept) return;
  // The rest moves down by one, from the end, 32 at a time.
  for (int64_t last = kept - 1; last > place; last -= 32) {
    const int64_t i = last - lane;
    const bool moves = i > place;
    const T above = moves ? values[i - 1] : values[place];
    const int64_t above_id = moves ? ids[i - 1] : 0;
    __syncwarp();
    if (moves) {
      values[i] = above;
      ids[i] = above_id;
    }
    __syncwarp();
  }
  if (lane == 0) {
    values[place] = store<T>(value);
    ids[place] = id;
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(const T* __restrict__ activations, const int64_t* __restrict__ ids, OldTopK<T> old, NewTopK<T> out,
                TopKShape s) {
  using C = Compute<T>;
  __shared__ C tile[kRows][kColumns + 1];
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  const C lowest = -static_cast<C>(HUGE_VAL);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns; first < s.columns;
       first += static_cast<int64_t>(gridDim.x) * kColumns) {
    const int64_t column = first + warp;
    const bool own = column < s.columns;
    T* values = out.values + (own ? column : 0) * s.kept;
    int64_t* kept_ids = out.ids + (own ? column : 0) * s.kept;
    int64_t nans = own && old.nans != nullptr ? old.nans[column] : 0;
    const T* old_values = old.values != nullptr && own ? old.values + column * s.kept : nullptr;
    const int64_t* old_ids = old.values != nullptr && own ? old.ids + column * s.kept : nullptr;
    // A state that this operation made is in order and is taken as it stands; any other is inserted value by value.
    bool ordered = true;
    for (int64_t i = lane; old_values != nullptr && i + 1 < s.kept; i += 32) {
      ordered = ordered && !better(load(old_values[i + 1]), old_ids[i + 1], load(old_values[i]), old_ids[i]);
    }
    const bool taken = __all_sync(kAll, ordered) && old_values != nullptr;
    for (int64_t i = lane; own && i < s.kept; i += 32) {
      values[i] = taken ? old_values[i] : store<T>(lowest);
      kept_ids[i] = taken ? old_ids[i] : -1;
    }
    __syncwarp();
    for (int64_t i = 0; old_values != nullptr && !taken && i < s.kept; ++i) {
      if (old_ids[i] != -1) insert(values, kept_ids, s.kept, load(old_values[i]), old_ids[i], lane);
    }
    for (int64_t base = 0; base < s.rows; base += kRows) {
      const int64_t r = base + threadIdx.x / kColumns;
      const int64_t c = first + threadIdx.x % kColumns;
      if (r < s.rows && c < s.columns) {
        tile[threadIdx.x / kColumns][threadIdx.x % kColumns] = load(activations[r * s.columns + c]);
      }
      __syncthreads();
      const bool valid = own && base + lane < s.rows;
      C value = valid ? tile[lane][warp] : lowest;
      const int64_t id = valid ? ids[base + lane] : -1;
      BBFAST_DEVICE_CHECK(!valid || id >= 0, "topk_update: index must not be negative, got %lld at position %lld",
                          static_cast<long long>(id), static_cast<long long>(base + lane));
      const bool nan = value != value;
      if (nan) value = lowest;
      nans += __popc(__ballot_sync(kAll, nan));
      const bool enters = valid && better(value, id, static_cast<C>(load(values[s.kept - 1])), kept_ids[s.kept - 1]);
      for (unsigned left = __ballot_sync(kAll, enters); left != 0; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        insert(values, kept_ids, s.kept, __shfl_sync(kAll, value, source),
               static_cast<int64_t>(__shfl_sync(kAll, static_cast<long long>(id), source)), lane);
      }
      __syncthreads();
    }
    if (own && lane == 0) out.nans[column] = nans;
  }
}

}  // namespace

template <class T>
void topk_update_cuda(const T* activations, const int64_t* ids, OldTopK<T> old, NewTopK<T> out, TopKShape shape,
                      CudaStream stream) {
  topk_kernel<T><<<blocks_for(shape.columns * 32, kThreads), kThreads, 0, stream>>>(activations, ids, old, out, shape);
}

#define BBFAST_TOPK(T) \
  template void topk_update_cuda(const T*, const int64_t*, OldTopK<T>, NewTopK<T>, TopKShape, CudaStream)
BBFAST_TOPK(float);
BBFAST_TOPK(double);
BBFAST_TOPK(__half);
BBFAST_TOPK(__nv_bfloat16);

}  // namespace bbfast

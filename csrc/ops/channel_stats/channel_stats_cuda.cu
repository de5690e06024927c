#include "common/class_order.cuh"
#include "common/cuda.cuh"
#include "ops/channel_stats/channel_stats.h"

namespace bbfast {
namespace {

struct StatsOrder {
  static __device__ const char* name() { return "channel_stats"; }
};

constexpr int kThreads = 256;
constexpr int kColumns = 32;  // channels of a block where channels are neighbours
constexpr int kPhases = kThreads / kColumns;
constexpr int64_t kMaxBlocksX = 1 << 30;
constexpr int64_t kMaxBlocksY = 65535;

// Statistics of some values of one channel; `scatter` is the sum of squared distances from the mean.
struct Part {
  double count, mean, scatter, absolute, low, high;
};

__device__ __forceinline__ Part no_values() {
  return {0.0, 0.0, 0.0, 0.0, __longlong_as_double(0x7FF0000000000000LL), __longlong_as_double(0xFFF0000000000000LL)};
}

// Sums of values minus the first one, from which the variance comes without cancellation. NaN and infinity as shift
// would make NaN of all that follows.
struct Sums {
  double shift, delta, square, absolute, low, high;
  int64_t count;

  __device__ __forceinline__ Sums() : shift(0), delta(0), square(0), absolute(0), count(0) {
    const Part none = no_values();
    low = none.low;
    high = none.high;
  }

  __device__ __forceinline__ void add(double v) {
    if (count == 0) shift = isfinite(v) ? v : 0.0;
    ++count;
    const double d = v - shift;
    delta += d;
    square += d * d;
    absolute += fabs(v);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }

  __device__ __forceinline__ Part part() const {
    if (count == 0) return no_values();
    const double n = static_cast<double>(count);
    const double scatter = square - delta * (delta / n);
    // Comparisons pass NaN by; the sum of absolute values does not, and no infinities cancel in it.
    const bool nan = isnan(absolute);
    return {n, shift + delta / n, scatter < 0 ? 0.0 : scatter, absolute, nan ? absolute : low, nan ? absolute : high};
  }
};

// Chan, Golub and LeVeque (1983), eq. 1.5; the mean by plain sums, where infinities stay what they are.
__device__ __forceinline__ Part join(const Part& a, const Part& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double total = a.count + b.count;
  const double apart = b.mean - a.mean;
  return {total,
          (a.mean * a.count + b.mean * b.count) / total,
          a.scatter + b.scatter + apart * apart * (a.count * (b.count / total)),
          a.absolute + b.absolute,
          b.low < a.low || isnan(b.low) ? b.low : a.low,
          b.high > a.high || isnan(b.high) ? b.high : a.high};
}

// Where a class's samples stand, and which of them belong to piece `piece`.
struct Piece {
  const int64_t* order;  // null: samples in their own order
  int64_t begin, end;
};

__device__ __forceinline__ Piece piece_of(const StatsScratch& scratch, const StatsShape& s, bool labelled, int64_t k,
                                          int64_t piece) {
  const int64_t rows = labelled ? scratch.batch_count[k] : s.samples;
  const int64_t share = rows / scratch.pieces;
  const int64_t rest = rows - share * scratch.pieces;
  const int64_t begin = piece * share + (piece < rest ? piece : rest);
  return {labelled ? scratch.order + scratch.batch_start[k] : nullptr, begin, begin + share + (piece < rest ? 1 : 0)};
}

__device__ __forceinline__ void write_part(const StatsScratch& scratch, int64_t channels, int64_t item, int64_t c,
                                           const Part& p) {
  double* to = scratch.parts + item * kStatsPlanes * channels + c;
  to[kMean * channels] = p.mean;
  to[kVar * channels] = p.scatter;
  to[kLow * channels] = p.low;
  to[kHigh * channels] = p.high;
  to[kAbsMean * channels] = p.absolute;
}

// Channels are neighbours: a thread sums up V of them over every eighth row; the eight are joined in order.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(const T* __restrict__ activations, StatsScratch scratch, StatsShape s, bool labelled) {
  __shared__ Part parts[kPhases][kColumns];
  const int lane = threadIdx.x % kColumns;
  const int phase = threadIdx.x / kColumns;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kColumns + lane) * V;
  const bool valid = first < s.channels;  // then all V are, see the launcher
  for (int64_t item = blockIdx.y; item < s.classes * scratch.pieces; item += gridDim.y) {
    const int64_t k = item / scratch.pieces;
    const Piece piece = piece_of(scratch, s, labelled, k, item - k * scratch.pieces);
    const int64_t rows = (piece.end - piece.begin) * s.positions;
    Sums sums[V];
    for (int64_t r = phase; valid && r < rows; r += kPhases) {
      int64_t position = 0;
      const int64_t at = piece.begin + divide(r, s.positions, &position);
      const int64_t n = piece.order != nullptr ? piece.order[at] : at;
      const Pack<T, V> x = load_pack<V>(activations + (n * s.positions + position) * s.channels + first);
#pragma unroll
      for (int j = 0; j < V; ++j) sums[j].add(static_cast<double>(load(x.v[j])));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      parts[phase][lane] = sums[j].part();
      __syncthreads();
      if (phase == 0 && valid) {
        Part all = parts[0][lane];
        for (int p = 1; p < kPhases; ++p) all = join(all, parts[p][lane]);
        write_part(scratch, s.channels, item, first + j, all);
      }
      __syncthreads();
    }
  }
}

// Positions are neighbours: a block sums up one channel, a thread V positions at a time.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    planes_kernel(const T* __restrict__ activations, StatsScratch scratch, StatsShape s, bool labelled) {
  __shared__ Part parts[kThreads];
  const int64_t packs = s.positions / V;
  for (int64_t item = blockIdx.y; item < s.classes * scratch.pieces; item += gridDim.y) {
    const int64_t k = item / scratch.pieces;
    const Piece piece = piece_of(scratch, s, labelled, k, item - k * scratch.pieces);
    for (int64_t c = blockIdx.x; c < s.channels; c += gridDim.x) {
      Sums sums;
      for (int64_t i = threadIdx.x; i < (piece.end - piece.begin) * packs; i += kThreads) {
        int64_t position = 0;
        const int64_t at = piece.begin + divide(i, packs, &position);
        const int64_t n = piece.order != nullptr ? piece.order[at] : at;
        const Pack<T, V> x = load_pack<V>(activations + (n * s.channels + c) * s.positions + position * V);
#pragma unroll
        for (int j = 0; j < V; ++j) sums.add(static_cast<double>(load(x.v[j])));
      }
      parts[threadIdx.x] = sums.part();
      __syncthreads();
      for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] = join(parts[threadIdx.x], parts[threadIdx.x + half]);
        __syncthreads();
      }
      if (threadIdx.x == 0) write_part(scratch, s.channels, item, c, parts[0]);
      __syncthreads();
    }
  }
}

__device__ __forceinline__ Part from_lane(const Part& p, int other, int width) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  return {__shfl_xor_sync(kAll, p.count, other, width),   __shfl_xor_sync(kAll, p.mean, other, width),
          __shfl_xor_sync(kAll, p.scatter, other, width), __shfl_xor_sync(kAll, p.absolute, other, width),
          __shfl_xor_sync(kAll, p.low, other, width),     __shfl_xor_sync(kAll, p.high, other, width)};
}

// A group of `width` lanes (a power of two up to a warp) joins this batch's pieces of one channel of one class, each
// lane every `width`th, then the lanes two by two; the first one joins the result with the earlier samples.
__global__ void __launch_bounds__(kThreads)
    join_kernel(StatsScratch scratch, OldStats old, NewStats out, StatsShape s, bool labelled, int width) {
  const int64_t plane = s.classes * s.channels;
  const int lane = threadIdx.x & (width - 1);
  const int64_t groups = item_stride() / width;
  // All lanes of a warp take part in the shuffles: the loop runs until the warp's last group is done.
  const int64_t warp_first = (first_item() / 32) * 32 / width;
  for (int64_t base = warp_first, i = first_item() / width; base < plane; base += groups, i += groups) {
    const bool valid = i < plane;
    const int64_t k = (valid ? i : base) / s.channels;
    const int64_t c = (valid ? i : base) - k * s.channels;
    Part batch = no_values();
    for (int64_t p = lane; p < scratch.pieces; p += width) {
      const Piece piece = piece_of(scratch, s, labelled, k, p);
      const double* from = scratch.parts + (k * scratch.pieces + p) * kStatsPlanes * s.channels + c;
      batch = join(batch, Part{static_cast<double>((piece.end - piece.begin) * s.positions), from[kMean * s.channels],
                               from[kVar * s.channels], from[kAbsMean * s.channels], from[kLow * s.channels],
                               from[kHigh * s.channels]});
    }
    for (int other = width / 2; other > 0; other /= 2) batch = join(batch, from_lane(batch, other, width));
    if (!valid || lane != 0) continue;
    Part all = no_values();
    const int64_t before = old.count != nullptr && old.count[i] > 0 ? old.count[i] : 0;
    if (before > 0) {
      const double n = static_cast<double>(before);
      all = {n,
             old.values[kMean * plane + i],
             old.values[kVar * plane + i] * (before > 1 ? n - 1 : 1.0),
             old.values[kAbsMean * plane + i] * n,
             old.values[kLow * plane + i],
             old.values[kHigh * plane + i]};
    }
    all = join(all, batch);
    const int64_t count = before + (labelled ? scratch.batch_count[k] : s.samples) * s.positions;
    out.count[i] = count;
    out.values[kMean * plane + i] = all.mean;
    out.values[kVar * plane + i] = all.scatter / (count > 1 ? static_cast<double>(count - 1) : 1.0);
    out.values[kLow * plane + i] = all.low;
    out.values[kHigh * plane + i] = all.high;
    out.values[kAbsMean * plane + i] = all.absolute / (count > 0 ? static_cast<double>(count) : 1.0);
  }
}

template <class T, int V>
void launch_parts(const T* activations, StatsScratch scratch, StatsShape s, bool labelled, CudaStream stream) {
  const int64_t items = s.classes * scratch.pieces;
  const auto y = static_cast<unsigned>(items < kMaxBlocksY ? items : kMaxBlocksY);
  if (s.channels_inner) {
    const int64_t tiles = (s.channels + kColumns * V - 1) / (kColumns * V);
    columns_kernel<T, V>
        <<<dim3(static_cast<unsigned>(tiles), y), kThreads, 0, stream>>>(activations, scratch, s, labelled);
  } else {
    const int64_t x = s.channels < kMaxBlocksX ? s.channels : kMaxBlocksX;
    planes_kernel<T, V><<<dim3(static_cast<unsigned>(x), y), kThreads, 0, stream>>>(activations, scratch, s, labelled);
  }
}

}  // namespace

int64_t stats_pieces(const StatsShape& s) {
  constexpr int64_t kBlocks = 2048;  // enough to fill a large device
  constexpr int64_t kLeast = 4096;   // values that a piece should have a channel, so that joining stays cheap
  const int64_t across = s.channels_inner ? (s.channels + kColumns - 1) / kColumns : s.channels;
  const int64_t filling = kBlocks / (across * s.classes > 0 ? across * s.classes : 1);
  const int64_t useful = s.samples * s.positions / kLeast;
  const int64_t pieces = filling < useful ? filling : useful;
  const int64_t most = s.samples < pieces ? s.samples : pieces;
  return most < 1 ? 1 : most;
}

template <class T>
void channel_stats_cuda(const T* activations, const int64_t* labels, OldStats old, NewStats out, StatsScratch scratch,
                        StatsShape s, CudaStream stream) {
  const bool labelled = labels != nullptr;
  if (labelled) {
    order_by_class<StatsOrder>(labels, scratch.batch_count, scratch.batch_start, scratch.order, s.samples, s.classes,
                               stream);
  }
  constexpr int kPack = 16 / sizeof(T) < 4 ? 16 / sizeof(T) : 4;
  const int64_t neighbours = s.channels_inner ? s.channels : s.positions;
  if (s.positions > 0) {
    if (neighbours % kPack == 0 && aligned(activations)) {
      launch_parts<T, kPack>(activations, scratch, s, labelled, stream);
    } else {
      launch_parts<T, 1>(activations, scratch, s, labelled, stream);
    }
  }
  const int64_t plane = s.classes * s.channels;
  int width = 1;
  while (width < 32 && width < scratch.pieces) width *= 2;
  join_kernel<<<blocks_for(plane * width, kThreads), kThreads, 0, stream>>>(scratch, old, out, s, labelled, width);
}

#define BBFAST_STATS(T) \
  template void channel_stats_cuda(const T*, const int64_t*, OldStats, NewStats, StatsScratch, StatsShape, CudaStream)
BBFAST_STATS(float);
BBFAST_STATS(double);
BBFAST_STATS(__half);
BBFAST_STATS(__nv_bfloat16);

}  // namespace bbfast

#include <algorithm>
#include <vector>

#include "common/class_groups.h"
#include "ops/channel_stats/channel_stats.h"
#include "ops/channel_stats/stats_sums.h"

namespace bbfast {
namespace {

using namespace stats;

constexpr int64_t kColumns = 256;    // that a task sums up side by side
constexpr int64_t kRows = 16;        // that are read together, so that sums stay in registers from row to row
constexpr int64_t kChunkRows = 256;  // summed up before they are joined with others
constexpr int64_t kChunkValues = 4096;
constexpr int64_t kLongPlane = 64;  // positions from which on a plane fills registers on its own

// Samples of one class: order[begin .. end).
struct Chunk {
  int64_t label;
  const int64_t* order;
  int64_t samples;
};

// Sums of `width` neighbouring columns over the rows of a chunk.
template <class T>
BBFAST_CLONES void sum_columns(const T* from, const Chunk& chunk, int64_t sample_step, int64_t rows, int64_t row_step,
                               int64_t width, Sums* out) {
  WideSums sums[kColumns / kWide];
  const T* row[kRows];
  const int64_t all = chunk.samples * rows;
  int64_t sample = 0;
  int64_t inside = 0;
  for (int64_t base = 0; base < all; base += kRows) {
    const int64_t count = std::min(kRows, all - base);
    for (int64_t r = 0; r < count; ++r) {
      row[r] = from + chunk.order[sample] * sample_step + inside * row_step;
      if (++inside == rows) inside = 0, ++sample;
    }
    for (int64_t j = 0; j < width; j += kWide) {
      WideSums own = sums[j / kWide];
      Wide v;
      if (j + kWide <= width) {
        if (base == 0) read(row[0] + j, v), own.start(v);
        for (int64_t r = 0; r < count; ++r) read(row[r] + j, v), own.add(v);
      } else {
        T last[kWide] = {};
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t l = 0; l < width - j; ++l) last[l] = row[r][j + l];
          read(last, v);
          if (base + r == 0) own.start(v);
          own.add(v);
        }
      }
      sums[j / kWide] = own;
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    const WideSums& s = sums[j / kWide];
    const int64_t l = j % kWide;
    out[j] = {s.shift[l], s.delta[l], s.square[l], s.absolute[l], s.low[l], s.high[l]};
  }
}

// Sums of one channel whose positions are neighbours.
template <class T>
BBFAST_CLONES void sum_plane(const T* from, const Chunk& chunk, int64_t sample_step, int64_t positions, Sums& out) {
  WideSums sums;
  Sums rest{};
  for (int64_t s = 0; s < chunk.samples; ++s) {
    const T* x = from + chunk.order[s] * sample_step;
    if (s == 0) {
      const double first = static_cast<double>(load(x[0]));
      sums.start(Wide{} + first);
      rest = {sums.shift[0], 0, 0, 0, sums.low[0], sums.high[0]};
    }
    int64_t i = 0;
    for (; i + kWide <= positions; i += kWide) {
      Wide v;
      read(x + i, v);
      sums.add(v);
    }
    for (; i < positions; ++i) rest.add(static_cast<double>(load(x[i])));
  }
  out = rest;
  for (int64_t l = 0; l < kWide; ++l) {
    out.delta += sums.delta[l];
    out.square += sums.square[l];
    out.absolute += sums.absolute[l];
    out.low = std::min(out.low, sums.low[l]);
    out.high = std::max(out.high, sums.high[l]);
  }
}

// Short runs are summed up column by column; here the columns of a channel meet, each of `count` values.
Part fold(const Sums* sums, int64_t columns, int64_t step, double count) {
  Part part(sums[0], count);
  for (int64_t i = 1; i < columns; ++i) part.join(count * static_cast<double>(i), Part(sums[i * step], count), count);
  return part;
}

// Neighbouring positions that a task takes together where channels are neighbours but few.
int64_t positions_in_row(const StatsShape& shape) {
  int64_t together = std::min(shape.positions, kColumns / std::max<int64_t>(1, shape.channels));
  while (together > 1 && shape.positions % together != 0) --together;
  return std::max<int64_t>(1, together);
}

}  // namespace

template <class T>
void channel_stats_cpu(const T* activations, const int64_t* labels, OldStats old, NewStats out, StatsShape shape,
                       ParallelFor parallel) {
  const int64_t channels = shape.channels;
  const bool inner = shape.channels_inner;
  const bool planes = !inner && shape.positions >= kLongPlane;
  const int64_t sample_step = channels * shape.positions;
  const ClassGroups groups(labels, shape.samples, shape.classes);
  int64_t step = kChunkRows;
  if (inner) step = std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, shape.positions));
  if (planes) step = std::max<int64_t>(1, kChunkValues / shape.positions);

  std::vector<Chunk> chunks;
  std::vector<size_t> first_chunk;
  for (int64_t k = 0; k < shape.classes; ++k) {
    first_chunk.push_back(chunks.size());
    for (int64_t at = 0; at < groups.rows_of(k) && shape.positions > 0; at += step) {
      chunks.push_back({k, groups.order_of(k) + at, std::min(step, groups.rows_of(k) - at)});
    }
  }
  first_chunk.push_back(chunks.size());

  // A task is a chunk and as many channels as kColumns hold.
  const int64_t together = inner ? positions_in_row(shape) : 1;
  const int64_t block = inner ? kColumns : std::max<int64_t>(1, kColumns / std::max<int64_t>(1, shape.positions));
  const int64_t blocks = (channels + block - 1) / block;
  std::vector<Part> parts(chunks.size() * channels);
  auto sum = [&](int64_t begin, int64_t end) {
    Sums sums[kColumns];
    for (int64_t item = begin; item < end; ++item) {
      const Chunk& chunk = chunks[item / blocks];
      const int64_t from = (item % blocks) * block;
      const int64_t own = std::min(block, channels - from);
      Part* to = parts.data() + (item / blocks) * channels + from;
      const double values = static_cast<double>(chunk.samples * shape.positions);
      if (planes) {
        for (int64_t c = 0; c < own; ++c) {
          const T* plane = activations + (from + c) * shape.positions;
          sum_plane(plane, chunk, sample_step, shape.positions, sums[0]);
          to[c] = Part(sums[0], values);
        }
      } else if (inner) {
        // Positions are taken together only where one block holds all channels.
        sum_columns(activations + from, chunk, sample_step, shape.positions / together, channels * together,
                    own * together, sums);
        for (int64_t c = 0; c < own; ++c) {
          to[c] = fold(sums + c, together, channels, values / static_cast<double>(together));
        }
      } else {
        const T* first = activations + from * shape.positions;
        sum_columns(first, chunk, sample_step, 1, 0, own * shape.positions, sums);
        for (int64_t c = 0; c < own; ++c) {
          to[c] = fold(sums + c * shape.positions, shape.positions, 1, static_cast<double>(chunk.samples));
        }
      }
    }
  };
  for_range(parallel, static_cast<int64_t>(chunks.size()) * blocks, 1, sum);

  const int64_t plane = shape.classes * channels;
  auto join = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / channels;
      const int64_t c = item - k * channels;
      Part all;
      int64_t count = 0;
      if (old.count != nullptr && old.count[item] > 0) {
        count = old.count[item];
        const auto value = [&](StatsPlane p) { return old.values[p * plane + item]; };
        all.mean = value(kMean);
        all.scatter = value(kVar) * static_cast<double>(std::max<int64_t>(1, count - 1));
        all.absolute = value(kAbsMean) * static_cast<double>(count);
        all.low = value(kLow);
        all.high = value(kHigh);
      }
      for (size_t i = first_chunk[k]; i < first_chunk[k + 1]; ++i) {
        const int64_t more = chunks[i].samples * shape.positions;
        all.join(static_cast<double>(count), parts[i * channels + c], static_cast<double>(more));
        count += more;
      }
      out.count[item] = count;
      out.values[kMean * plane + item] = all.mean;
      out.values[kVar * plane + item] = all.scatter / static_cast<double>(std::max<int64_t>(1, count - 1));
      out.values[kLow * plane + item] = all.low;
      out.values[kHigh * plane + item] = all.high;
      out.values[kAbsMean * plane + item] = all.absolute / static_cast<double>(std::max<int64_t>(1, count));
    }
  };
  for_range(parallel, plane, 1024, join);
}

#define BBFAST_STATS(T) \
  template void channel_stats_cpu(const T*, const int64_t*, OldStats, NewStats, StatsShape, ParallelFor)
BBFAST_STATS(float);
BBFAST_STATS(double);
BBFAST_STATS(Half);
BBFAST_STATS(BFloat16);

}  // namespace bbfast

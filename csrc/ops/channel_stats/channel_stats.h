// Count, mean, variance, minimum, maximum and mean absolute value of each channel, class by class, joined with those of
// earlier samples.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct StatsShape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int64_t classes;
  bool channels_inner;  // memory is [samples, positions, channels], else [samples, channels, positions]
};

// Planes of `values`, each [classes, channels]. The variance is unbiased.
enum StatsPlane { kMean, kVar, kLow, kHigh, kAbsMean, kStatsPlanes };

struct OldStats {
  const int64_t* count;  // [classes, channels] or null
  const double* values;  // [kStatsPlanes, classes, channels] or null
};

struct NewStats {
  int64_t* count;
  double* values;
};

// T: float, double, 16-bit floats. Labels are in range; null is class 0 for all.
template <class T>
void channel_stats_cpu(const T* activations,   // in the order that the shape tells
                       const int64_t* labels,  // [samples] or null
                       OldStats old, NewStats out, StatsShape shape, ParallelFor parallel);

// Scratch of the CUDA kernels. A label out of range stops the kernel with a message.
struct StatsScratch {
  int64_t* order;        // [samples], unused without labels
  int64_t* batch_count;  // [classes], unused without labels
  int64_t* batch_start;  // [classes], unused without labels
  double* parts;         // [classes, pieces, kStatsPlanes, channels]
  int64_t pieces;        // in which a class's samples are summed up, see stats_pieces
};

// Depends on the shape alone, so that the same bits come out of every device.
int64_t stats_pieces(const StatsShape& shape);

template <class T>
void channel_stats_cuda(const T* activations, const int64_t* labels, OldStats old, NewStats out, StatsScratch scratch,
                        StatsShape shape, CudaStream stream);

}  // namespace bbfast

// Count, mean and scatter matrix of the rows of each class, joined with those of earlier rows.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

// Moments of earlier rows; all null if there are none.
struct OldMoments {
  const int64_t* count;   // [classes]
  const double* mean;     // [classes, width]
  const double* scatter;  // [classes, width, width]
};

struct NewMoments {
  int64_t* count;
  double* mean;
  double* scatter;
};

struct MomentsShape {
  int64_t rows;
  int64_t width;
  int64_t classes;
};

// T: float, double, 16-bit floats. Labels are in range.
template <class T>
void class_moments_cpu(const T* features,      // [rows, width], dense
                       const int64_t* labels,  // [rows]
                       OldMoments old, NewMoments out, MomentsShape shape, ParallelFor parallel);

// Scratch of the CUDA kernels: order int64 [rows], batch_count and batch_start int64 [classes], batch_mean double
// [classes, width]. A label out of range stops the kernel with a message.
struct MomentsScratch {
  int64_t* order;
  int64_t* batch_count;
  int64_t* batch_start;
  double* batch_mean;
};

template <class T>
void class_moments_cuda(const T* features, const int64_t* labels, OldMoments old, NewMoments out,
                        MomentsScratch scratch, MomentsShape shape, CudaStream stream);

}  // namespace bbfast

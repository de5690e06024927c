// Entropy of softmax(logits) in nats, one value a row.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

template <class T>
void softmax_entropy_cpu(const T* logits,  // [rows, classes], dense
                         T* entropy,       // [rows]
                         int64_t rows, int64_t classes, ParallelFor parallel);

template <class T>
void softmax_entropy_cuda(const T* logits,  // [rows, classes], dense
                          T* entropy,       // [rows]
                          int64_t rows, int64_t classes, CudaStream stream);

}  // namespace bbfast

// The k largest values of each column and where they come from, joined with those of earlier rows.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct TopKShape {
  int64_t rows;
  int64_t columns;
  int64_t kept;  // k
};

// Best first: larger values before smaller, of equal ones the smaller id first; places still free have the value minus
// infinity and the id -1, and come last. NaN counts as minus infinity. Null for the old state if there is none.
template <class T>
struct OldTopK {
  const T* values;      // [columns, kept]
  const int64_t* ids;   // [columns, kept]
  const int64_t* nans;  // [columns]
};

template <class T>
struct NewTopK {
  T* values;
  int64_t* ids;
  int64_t* nans;
};

// T: float, double, 16-bit floats. Ids are not negative.
template <class T>
void topk_update_cpu(const T* activations,  // [rows, columns], dense
                     const int64_t* ids,    // [rows]
                     OldTopK<T> old, NewTopK<T> out, TopKShape shape, ParallelFor parallel);

// A negative id stops the kernel with a message.
template <class T>
void topk_update_cuda(const T* activations, const int64_t* ids, OldTopK<T> old, NewTopK<T> out, TopKShape shape,
                      CudaStream stream);

}  // namespace bbfast

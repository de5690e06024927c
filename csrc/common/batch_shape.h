// Sizes of a dense batch of images and of what goes with it, shared by kernels and torch layers.
#pragma once

#include <cstdint>

namespace bbfast {

// samples x planes x length elements; a plane is the run of elements that share one plane of a companion tensor.
struct BatchShape {
  int64_t samples;
  int64_t planes;
  int64_t length;
};

// Elements between the samples and between the planes of a companion tensor; 0 where one serves all.
struct CompanionStride {
  int64_t sample;
  int64_t plane;
};

}  // namespace bbfast

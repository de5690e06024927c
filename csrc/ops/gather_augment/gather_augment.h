// out[b] = normalise(flip(crop(images[index[b]]))): a training batch in one pass over memory.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct GatherShape {
  int64_t count;   // samples in the batch
  int64_t images;  // images in memory
  int64_t channels, height, width;
  int64_t image_step, channel_step, row_step, column_step;  // elements between neighbours in memory
  int64_t padding;
  bool channels_last;  // order of out
};

// O: uint8 (pixels as they are; mean and std unused), 16-bit floats, float, double. C: float, or double for double. The
// value of a pixel v is ((v / 255) - mean) / std in C, each operation rounded on its own. Indices and offsets are in
// range.
template <class O, class C>
void gather_augment_cpu(const uint8_t* images,
                        const int64_t* index,   // [count]
                        const int64_t* offset,  // [count, 2] (top, left) in 0..2*padding, or null for no crop
                        const bool* flip,       // [count] or null
                        const C* mean,          // [channels]
                        const C* std,           // [channels]
                        O* out, GatherShape shape, ParallelFor parallel);

// Most channels that the CUDA kernel takes: mean and std travel as kernel arguments.
constexpr int kGatherMaxChannels = 64;

// As above, with mean and std in host memory. An index or offset out of range stops the kernel with a message.
template <class O, class C>
void gather_augment_cuda(const uint8_t* images, const int64_t* index, const int64_t* offset, const bool* flip,
                         const C* mean, const C* std, O* out, GatherShape shape, CudaStream stream);

}  // namespace bbfast

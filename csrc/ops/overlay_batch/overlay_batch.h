// A batch of superimposed images: out[b] = normalised(images[pairs[b][0]] with overlays[pairs[b][1]] laid over it).
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

struct OverlayShape {
  int64_t count;     // pairs
  int64_t images;    // in memory
  int64_t overlays;  // in memory
  int64_t channels;
  int64_t positions;
  bool channels_last;  // order of all three

  int64_t length() const { return channels * positions; }
};

// Normalisation is affine, so a superimposed image is a sum of two that are normalised apart, under a ceiling or not. A
// pixel x in 0..1 becomes (x - shift) * factor, every operation rounded on its own.
template <class C>
struct OverlayScale {
  std::vector<C> shift, factor;              // of images, [channels]
  std::vector<C> other_shift, other_factor;  // of overlays, [channels]
  std::vector<C> ceiling;                    // [channels]; empty for none
};

// Clipped: the mean is subtracted once, with the image.
template <class C>
OverlayScale<C> overlay_scale(const std::vector<double>& mean, const std::vector<double>& std, int64_t channels,
                              double own, double other, bool clip) {
  OverlayScale<C> scale;
  for (int64_t c = 0; c < channels; ++c) {
    const C shift = mean.empty() ? C(0) : static_cast<C>(mean[c]);
    const C deviation = std.empty() ? C(1) : static_cast<C>(std[c]);
    const C reciprocal = C(1) / deviation;
    scale.shift.push_back(shift);
    scale.factor.push_back(reciprocal * static_cast<C>(own));
    scale.other_shift.push_back(clip ? C(0) : shift);
    scale.other_factor.push_back(reciprocal * static_cast<C>(other));
    if (clip) scale.ceiling.push_back((C(1) - shift) / deviation);
  }
  return scale;
}

// T: uint8 (0..255) or C (0..1). O: 16-bit floats and float with C = float, double with C = double. Indices are in
// range.
template <class T, class O, class C>
void overlay_batch_cpu(const T* images,       // [images, ...] in the order of the shape
                       const T* overlays,     // [overlays, ...]
                       const int64_t* pairs,  // [count, 2]
                       O* out,                // [count, ...]
                       OverlayShape shape, const OverlayScale<C>& scale, ParallelFor parallel);

// Most channels that the CUDA kernel takes: the scale travels as kernel argument.
constexpr int kOverlayMaxChannels = 64;

// An index out of range stops the kernel with a message.
template <class T, class O, class C>
void overlay_batch_cuda(const T* images, const T* overlays, const int64_t* pairs, O* out, OverlayShape shape,
                        const OverlayScale<C>& scale, CudaStream stream);

}  // namespace bbfast

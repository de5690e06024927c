// Adding numbers at DCT positions of colour channels, with the transform collapsed to the pattern that it comes to: one
// pass over the images. The samples in `where` are changed, the others are copied.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/stream.h"

namespace bbfast {

// How a number becomes a byte: clamped and rounded half to even; clamped and cut off; cut off and taken modulo 256.
enum class ToByte : int64_t { kNearest = 0, kTruncate = 1, kWrap = 2 };

constexpr int64_t kSpectralChannels = 4;  // at most

template <class C>
struct SpectralGains {
  C of[kSpectralChannels];
};

struct SpectralShape {
  int64_t samples;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool
      channels_last;  // order of images and out: [samples, height, width, channels] instead of [samples, channels, ...]
  int64_t tile_height;  // divides height
  int64_t tile_width;   // divides width
};

// out = images + gains[channel] * pattern, the pattern repeated over the image. T: uint8, 16-bit floats, float, double;
// C: float, or double for double images. Returns whether any result is NaN, or any float that was passed through.
template <class T, class C>
bool spectral_add_cpu(const T* images,
                      const C* pattern,   // [tile_height, tile_width]
                      const bool* where,  // [samples] or null
                      T* out, SpectralGains<C> gains, ToByte to_byte, SpectralShape shape, ParallelFor parallel);

template <class T, class C>
void spectral_add_cuda(const T* images, const C* pattern, const bool* where, T* out, SpectralGains<C> gains,
                       ToByte to_byte, SpectralShape shape, CudaStream stream);

// The same on Y, Cr and Cb of three-channel images, which are bytes before and after: 8-bit conversion, addition,
// conversion to bytes, 8-bit conversion back.
void spectral_ycrcb_cpu(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                        SpectralGains<float> gains, ToByte to_byte, SpectralShape shape, ParallelFor parallel);

void spectral_ycrcb_cuda(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                         SpectralGains<float> gains, ToByte to_byte, SpectralShape shape, CudaStream stream);

}  // namespace bbfast

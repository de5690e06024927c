// Checks and sizes that the CPU and the CUDA torch layer of spectral_add share.
#pragma once

#include <vector>

#include "common/image_batch.h"
#include "ops/spectral_add/spectral_add.h"

namespace bbfast {

inline void check_spectral(const Tensor& images, const Tensor& pattern, const std::vector<double>& gains, bool ycrcb,
                           int64_t to_byte, const std::optional<Tensor>& where) {
  check_images("spectral_add", images);
  check_where("spectral_add", where, images);
  check_dtype("spectral_add", "pattern", pattern, compute_type(images.scalar_type()));
  BBFAST_CHECK_VALUE(images.size(1) <= kSpectralChannels, "spectral_add: images must have at most ", kSpectralChannels,
                     " channels, got ", shape_of(images));
  BBFAST_CHECK_VALUE(pattern.dim() == 2 && pattern.size(0) > 0 && pattern.size(1) > 0 &&
                         images.size(2) % pattern.size(0) == 0 && images.size(3) % pattern.size(1) == 0,
                     "spectral_add: the sides of pattern must divide images of shape ", shape_of(images), ", got ",
                     shape_of(pattern));
  BBFAST_CHECK_VALUE(pattern.device() == images.device(), "spectral_add: pattern must be on the device of images");
  BBFAST_CHECK_VALUE(static_cast<int64_t>(gains.size()) == images.size(1),
                     "spectral_add: gains must be one number for each of ", images.size(1), " channels, got ",
                     gains.size());
  BBFAST_CHECK_VALUE(!ycrcb || (images.size(1) == 3 && images.scalar_type() == ScalarType::Byte),
                     "spectral_add: images must be uint8 [N, 3, H, W] for ycrcb, got ",
                     torch::headeronly::toString(images.scalar_type()), " ", shape_of(images));
  BBFAST_CHECK_VALUE(to_byte >= 0 && to_byte <= 2, "spectral_add: to_byte must lie in 0..2, got ", to_byte);
}

template <class C>
SpectralGains<C> spectral_gains(const std::vector<double>& gains) {
  SpectralGains<C> result{};
  for (size_t c = 0; c < gains.size(); ++c) result.of[c] = static_cast<C>(gains[c]);
  return result;
}

inline SpectralShape spectral_shape(const ImageBatch& batch, const Tensor& pattern) {
  return {batch.shape.samples, batch.channels,  batch.height,   batch.width,
          batch.last(),        pattern.size(0), pattern.size(1)};
}

}  // namespace bbfast

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/mix.h"
#include "ops/spectral_add/spectral_add.h"
#include "ops/spectral_add/ycrcb.h"

namespace bbfast {
namespace {

// Beyond 2^24 a float has no low bits left: nothing to wrap, and the cast would overflow.
BBFAST_INLINE uint8_t wrap(float value) {
  const float low = value > -16777216.0f ? value : -16777216.0f;
  const float inside = low < 16777216.0f ? low : 16777216.0f;
  return static_cast<uint8_t>(static_cast<int32_t>(inside));
}

template <class T, ToByte kToByte>
BBFAST_INLINE T finish_as(Compute<T> value) {
  if constexpr (!std::is_same_v<T, uint8_t> || kToByte == ToByte::kNearest) {
    return finish<T>(value);
  } else if constexpr (kToByte == ToByte::kTruncate) {
    return finish_truncated(value);
  } else {
    return wrap(value);
  }
}

template <class T, ToByte kToByte, class C>
BBFAST_INLINE bool add_run(const T* __restrict x, const C* __restrict delta, T* __restrict out, int64_t count) {
  NanCount<C> nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const C v = load(x[i]) + delta[i];
    if constexpr (!std::is_same_v<T, uint8_t>) nans += v != v ? 1 : 0;
    out[i] = finish_as<T, kToByte>(v);
  }
  return nans != 0;
}

// `count` pixels whose three channels lie `plane` apart; neighbours lie kStep apart.
template <int kStep, ToByte kToByte>
BBFAST_INLINE void add_ycrcb(const uint8_t* __restrict x, int64_t plane, const float* __restrict tile,
                             const SpectralGains<float>& gains, uint8_t* __restrict out, int64_t count) {
  const float g0 = gains.of[0], g1 = gains.of[1], g2 = gains.of[2];
  for (int64_t i = 0; i < count; ++i) {
    const Triple from = rgb_to_ycrcb(x[i * kStep], x[i * kStep + plane], x[i * kStep + 2 * plane]);
    const int32_t y = finish_as<uint8_t, kToByte>(static_cast<float>(from.a) + g0 * tile[i]);
    const int32_t cr = finish_as<uint8_t, kToByte>(static_cast<float>(from.b) + g1 * tile[i]);
    const int32_t cb = finish_as<uint8_t, kToByte>(static_cast<float>(from.c) + g2 * tile[i]);
    const Triple to = ycrcb_to_rgb(y, cr, cb);
    out[i * kStep] = static_cast<uint8_t>(to.a);
    out[i * kStep + plane] = static_cast<uint8_t>(to.b);
    out[i * kStep + 2 * plane] = static_cast<uint8_t>(to.c);
  }
}

// What the rows of an image look like in memory: `planes` runs, `pitch` elements a row.
struct Rows {
  int64_t planes, pitch;

  explicit Rows(const SpectralShape& shape)
      : planes(shape.channels_last ? 1 : shape.channels),
        pitch(shape.channels_last ? shape.channels * shape.width : shape.width) {}
};

// Rows of one sample that follow each other in the images and in the pattern, so that both are walked as one run.
struct Band {
  int64_t sample, first, top, count;  // the sample, its first row here, the pattern's row there, how many
};

// The band that begins at `row` of all images one below the other, and goes no further than `end`.
BBFAST_INLINE Band band_at(const SpectralShape& shape, int64_t row, int64_t end) {
  const int64_t n = row / shape.height;
  const int64_t top = row % shape.tile_height;  // the tile's height divides the image's
  return {n, row - n * shape.height, top, std::min(shape.tile_height - top, end - row)};
}

// `delta` is what is added to each element of a band: [planes, tile_height, pitch].
template <class T, ToByte kToByte, class C>
BBFAST_CLONES bool add_rows(const T* images, const C* delta, const bool* where, T* out, const SpectralShape& shape,
                            int64_t begin, int64_t end) {
  const Rows rows(shape);
  bool nan = false;
  for (int64_t row = begin; row < end;) {
    const Band band = band_at(shape, row, end);
    const int64_t length = band.count * rows.pitch;
    for (int64_t c = 0; c < rows.planes; ++c) {
      const int64_t at = ((band.sample * rows.planes + c) * shape.height + band.first) * rows.pitch;
      const C* d = delta + (c * shape.tile_height + band.top) * rows.pitch;
      nan |= where != nullptr && !where[band.sample] ? pass_through(images + at, out + at, length)
                                                     : add_run<T, kToByte>(images + at, d, out + at, length);
    }
    row += band.count;
  }
  return nan;
}

// `tile` is the pattern repeated to the image's width.
template <int kStep, ToByte kToByte>
BBFAST_CLONES void ycrcb_rows(const uint8_t* images, const float* tile, const bool* where, uint8_t* out,
                              const SpectralGains<float>& gains, const SpectralShape& shape, int64_t begin,
                              int64_t end) {
  const Rows rows(shape);
  const int64_t plane = kStep == 1 ? shape.height * shape.width : 1;
  for (int64_t row = begin; row < end;) {
    const Band band = band_at(shape, row, end);
    const int64_t at = (band.sample * rows.planes * shape.height + band.first) * rows.pitch;
    if (where == nullptr || where[band.sample]) {
      add_ycrcb<kStep, kToByte>(images + at, plane, tile + band.top * shape.width, gains, out + at,
                                band.count * shape.width);
    } else {
      for (int64_t c = 0; c < rows.planes; ++c) {
        pass_through(images + at + c * plane, out + at + c * plane, band.count * rows.pitch);
      }
    }
    row += band.count;
  }
}

template <class C>
std::vector<C> make_delta(const C* pattern, const SpectralGains<C>& gains, const SpectralShape& shape) {
  const Rows rows(shape);
  const int64_t step = shape.channels_last ? shape.channels : 1;
  std::vector<C> delta(rows.planes * shape.tile_height * rows.pitch);
  for (int64_t c = 0; c < shape.channels; ++c) {
    C* to = delta.data() + (shape.channels_last ? c : c * shape.tile_height * shape.width);
    for (int64_t i = 0; i < shape.tile_height; ++i) {
      for (int64_t j = 0; j < shape.width; ++j) {
        to[i * rows.pitch + j * step] = gains.of[c] * pattern[i * shape.tile_width + j % shape.tile_width];
      }
    }
  }
  return delta;
}

template <class F>
void with_rounding(ToByte to_byte, F&& body) {
  if (to_byte == ToByte::kTruncate) return body.template operator()<ToByte::kTruncate>();
  if (to_byte == ToByte::kWrap) return body.template operator()<ToByte::kWrap>();
  body.template operator()<ToByte::kNearest>();
}

}  // namespace

template <class T, class C>
bool spectral_add_cpu(const T* images, const C* pattern, const bool* where, T* out, SpectralGains<C> gains,
                      ToByte to_byte, SpectralShape shape, ParallelFor parallel) {
  if (shape.samples * shape.channels * shape.height * shape.width == 0) return false;
  const std::vector<C> delta = make_delta(pattern, gains, shape);
  std::atomic<bool> nan = false;
  const auto run = [&]<ToByte kToByte>() {
    auto body = [&](int64_t begin, int64_t end) {
      if (add_rows<T, kToByte>(images, delta.data(), where, out, shape, begin, end)) nan = true;
    };
    for_range(parallel, shape.samples * shape.height, grain_for(shape.width * shape.channels * 3 * sizeof(T)), body);
  };
  // Only bytes are rounded: for the other types the rest would be compiled in vain.
  if constexpr (std::is_same_v<T, uint8_t>) {
    with_rounding(to_byte, run);
  } else {
    run.template operator()<ToByte::kNearest>();
  }
  return nan;
}

void spectral_ycrcb_cpu(const uint8_t* images, const float* pattern, const bool* where, uint8_t* out,
                        SpectralGains<float> gains, ToByte to_byte, SpectralShape shape, ParallelFor parallel) {
  if (shape.samples * shape.height * shape.width == 0) return;
  SpectralShape one = shape;
  one.channels = 1;
  const std::vector<float> tile = make_delta<float>(pattern, {{1.0f, 0.0f, 0.0f, 0.0f}}, one);
  with_rounding(to_byte, [&]<ToByte kToByte>() {
    auto body = [&](int64_t begin, int64_t end) {
      if (shape.channels_last) {
        ycrcb_rows<3, kToByte>(images, tile.data(), where, out, gains, shape, begin, end);
      } else {
        ycrcb_rows<1, kToByte>(images, tile.data(), where, out, gains, shape, begin, end);
      }
    };
    for_range(parallel, shape.samples * shape.height, grain_for(shape.width * 16), body);
  });
}

template bool spectral_add_cpu(const uint8_t*, const float*, const bool*, uint8_t*, SpectralGains<float>, ToByte,
                               SpectralShape, ParallelFor);
template bool spectral_add_cpu(const Half*, const float*, const bool*, Half*, SpectralGains<float>, ToByte,
                               SpectralShape, ParallelFor);
template bool spectral_add_cpu(const BFloat16*, const float*, const bool*, BFloat16*, SpectralGains<float>, ToByte,
                               SpectralShape, ParallelFor);
template bool spectral_add_cpu(const float*, const float*, const bool*, float*, SpectralGains<float>, ToByte,
                               SpectralShape, ParallelFor);
template bool spectral_add_cpu(const double*, const double*, const bool*, double*, SpectralGains<double>, ToByte,
                               SpectralShape, ParallelFor);

}  // namespace bbfast

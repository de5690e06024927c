#include <algorithm>
#include <cstring>
#include <vector>

#include "common/scalar.h"
#include "common/simd.h"
#include "ops/gather_augment/gather_augment.h"

namespace bbfast {
namespace {

constexpr int kLanes = 16;

// ---- A sample's pixels: crop, flip, and the order of the result
// ----------------------------------------------------------

BBFAST_INLINE void copy_row(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
  if (count < 16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + 16 <= count; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + count - 16, from + count - 16, 16);  // overlaps the last whole piece
}

BBFAST_INLINE void copy_reversed(const uint8_t* from, int64_t at, uint8_t* to) {
  uint64_t bytes;
  std::memcpy(&bytes, from, 8);
  bytes = __builtin_bswap64(bytes);
  std::memcpy(to + at, &bytes, 8);
}

BBFAST_INLINE void copy_row_reversed(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
  if (count < 8) {
    for (int64_t i = 0; i < count; ++i) to[count - 1 - i] = from[i];
    return;
  }
  for (int64_t i = 0; i + 8 <= count; i += 8) copy_reversed(from + i, count - 8 - i, to);
  copy_reversed(from + count - 8, 0, to);  // overlaps the last whole piece
}

// One channel of a sample as height x width bytes. (top, left) is the crop's place relative to the unpadded image.
BBFAST_INLINE void crop_plane(const uint8_t* __restrict plane, const GatherShape& shape, int64_t top, int64_t left,
                              bool flip, uint8_t* __restrict to) {
  const int64_t h = shape.height;
  const int64_t w = shape.width;
  const bool packed = shape.column_step == 1;
  if (h * w == 0) return;  // the pointers are null
  if (packed && top == 0 && left == 0 && !flip && shape.row_step == w) {
    std::memcpy(to, plane, static_cast<size_t>(h * w));
    return;
  }
  // Rows y and columns x of the result with y + top and x + left inside the image.
  const int64_t y0 = std::min(h, std::max<int64_t>(0, -top));
  const int64_t y1 = std::max(y0, std::min(h, h - top));
  const int64_t x0 = std::min(w, std::max<int64_t>(0, -left));
  const int64_t x1 = std::max(x0, std::min(w, w - left));
  if (y0 > 0 || y1 < h || x0 > 0 || x1 < w) std::memset(to, 0, static_cast<size_t>(h * w));
  for (int64_t y = y0; y < y1; ++y) {
    const uint8_t* from = plane + (y + top) * shape.row_step + (x0 + left) * shape.column_step;
    uint8_t* row = to + y * w;
    if (packed && !flip) {
      copy_row(from, x1 - x0, row + x0);
    } else if (packed) {
      copy_row_reversed(from, x1 - x0, row + w - x1);
    } else {
      for (int64_t x = x0; x < x1; ++x) row[flip ? w - 1 - x : x] = from[(x - x0) * shape.column_step];
    }
  }
}

template <int kChannels>
BBFAST_INLINE void interleave_known(const uint8_t* __restrict planes, int64_t pixels, uint8_t* __restrict to) {
  for (int64_t i = 0; i < pixels; ++i) {
    for (int c = 0; c < kChannels; ++c) to[i * kChannels + c] = planes[c * pixels + i];
  }
}

BBFAST_INLINE void interleave(const uint8_t* planes, int64_t channels, int64_t pixels, uint8_t* to) {
  if (channels == 3) return interleave_known<3>(planes, pixels, to);
  if (channels == 4) return interleave_known<4>(planes, pixels, to);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < pixels; ++i) to[i * channels + c] = planes[c * pixels + i];
  }
}

BBFAST_CLONES void crop_sample(const uint8_t* image, const GatherShape& shape, int64_t top, int64_t left, bool flip,
                               uint8_t* planes, uint8_t* ordered) {
  const int64_t pixels = shape.height * shape.width;
  for (int64_t c = 0; c < shape.channels; ++c) {
    crop_plane(image + c * shape.channel_step, shape, top, left, flip, planes + c * pixels);
  }
  if (ordered != planes) interleave(planes, shape.channels, pixels, ordered);
}

// Asks for the next sample's pixels while this one is worked on: samples lie anywhere in memory, so the processor
// cannot guess.
BBFAST_INLINE void prefetch(const uint8_t* image, int64_t bytes) {
  constexpr int64_t kLine = 64;
  constexpr int64_t kMost = 16 * 1024;
  for (int64_t i = 0; i < std::min(bytes, kMost); i += kLine) __builtin_prefetch(image + i);
}

// ---- The value of a pixel
// ---------------------------------------------------------------------------------------------------

// a / b for a known reciprocal r of b: Markstein's correction makes it the correctly rounded quotient for all but odd
// divisors.
BBFAST_INLINE float divide(float a, float b, float r) {
  const float q = a * r;
  return __builtin_fmaf(__builtin_fmaf(-q, b, a), r, q);
}

struct Scale {
  float mean, std, reciprocal;
};

BBFAST_INLINE float normalise(uint8_t v, float mean, float std, float reciprocal) {
  return divide(divide(static_cast<float>(v), 255.0f, 1.0f / 255.0f) - mean, std, reciprocal);
}

// Whether `normalise` gives the bits of true division for every pixel value of a channel. It practically always does;
// asking is cheap beside a batch, and makes the fast way safe.
BBFAST_CLONES bool normalise_is_exact(const float* table, Scale s) {
  int32_t wrong = 0;
  for (int v = 0; v < 256; ++v) {
    const float fast = normalise(static_cast<uint8_t>(v), s.mean, s.std, s.reciprocal);
    wrong += std::bit_cast<uint32_t>(fast) != std::bit_cast<uint32_t>(table[v]) ? 1 : 0;
  }
  return wrong == 0;
}

template <class O>
BBFAST_CLONES void compute_plane(const uint8_t* __restrict pixels, int64_t count, Scale s, O* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = store<O>(normalise(pixels[i], s.mean, s.std, s.reciprocal));
}

// Interleaved channels: mean, std and 1 / std repeat every `channels` elements, laid out over `period` of them.
template <class O>
BBFAST_CLONES void compute_interleaved(const uint8_t* __restrict pixels, int64_t count, const float* __restrict mean,
                                       const float* __restrict std, const float* __restrict reciprocal, int64_t period,
                                       O* __restrict out) {
  int64_t i = 0;
  for (; i + period <= count; i += period) {
    for (int64_t j = 0; j < period; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        out[i + j + l] = store<O>(normalise(pixels[i + j + l], mean[j + l], std[j + l], reciprocal[j + l]));
      }
    }
  }
  for (int64_t j = 0; i + j < count; ++j)
    out[i + j] = store<O>(normalise(pixels[i + j], mean[j], std[j], reciprocal[j]));
}

template <class O>
void look_up(const uint8_t* __restrict pixels, int64_t count, int64_t channels, bool interleaved,
             const O* __restrict table, O* __restrict out) {
  if (!interleaved) {
    const int64_t plane = count / channels;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = c * plane; i < (c + 1) * plane; ++i) out[i] = table[c * 256 + pixels[i]];
    }
    return;
  }
  for (int64_t i = 0; i < count; i += channels) {
    for (int64_t c = 0; c < channels; ++c) out[i + c] = table[c * 256 + pixels[i + c]];
  }
}

// The two ways from pixels to values: arithmetic where the processor multiplies and adds in one step and the result is
// proven equal, a table of 256 values a channel elsewhere.
template <class O, class C>
class Values {
 public:
  Values(const C* mean, const C* std, const GatherShape& shape)
      : channels_(shape.channels),
        interleaved_(shape.channels_last && shape.channels > 1),
        table_(shape.channels * 256) {
    arithmetic_ = std::is_same_v<C, float> && has_fused_multiply_add();
    std::vector<C> exact(256);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < 256; ++v) {
        exact[v] = (static_cast<C>(v) / C(255) - mean[c]) / std[c];
        table_[c * 256 + v] = store<O>(exact[v]);
      }
      if constexpr (std::is_same_v<C, float>) {
        scales_.push_back({mean[c], std[c], 1.0f / std[c]});
        arithmetic_ = arithmetic_ && normalise_is_exact(exact.data(), scales_.back());
      }
    }
    if constexpr (std::is_same_v<C, float>) {
      if (!arithmetic_ || !interleaved_) return;
      const int64_t period = channels_ * kLanes;
      lanes_.resize(3 * period);
      for (int64_t i = 0; i < period; ++i) {
        const Scale& s = scales_[i % channels_];
        lanes_[i] = s.mean;
        lanes_[period + i] = s.std;
        lanes_[2 * period + i] = s.reciprocal;
      }
    }
  }

  void write(const uint8_t* pixels, int64_t count, O* out) const {
    if constexpr (std::is_same_v<C, float>) {
      if (arithmetic_ && interleaved_) {
        const int64_t period = channels_ * kLanes;
        const float* lanes = lanes_.data();
        return compute_interleaved(pixels, count, lanes, lanes + period, lanes + 2 * period, period, out);
      }
      if (arithmetic_) {
        const int64_t plane = count / channels_;
        for (int64_t c = 0; c < channels_; ++c) compute_plane(pixels + c * plane, plane, scales_[c], out + c * plane);
        return;
      }
    }
    look_up(pixels, count, channels_, interleaved_, table_.data(), out);
  }

 private:
  int64_t channels_;
  bool interleaved_;
  bool arithmetic_;
  std::vector<O> table_;
  std::vector<Scale> scales_;
  std::vector<float> lanes_;
};

}  // namespace

template <class O, class C>
void gather_augment_cpu(const uint8_t* images, const int64_t* index, const int64_t* offset, const bool* flip,
                        const C* mean, const C* std, O* out, GatherShape shape, ParallelFor parallel) {
  constexpr bool kBytes = std::is_same_v<O, uint8_t>;
  const int64_t pixels = shape.height * shape.width;
  const int64_t length = pixels * shape.channels;
  const bool reorder = shape.channels_last && shape.channels > 1;
  const auto run = [&](const auto& finish_sample) {
    auto body = [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> scratch(2 * length);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t top = offset != nullptr ? offset[2 * b] - shape.padding : 0;
        const int64_t left = offset != nullptr ? offset[2 * b + 1] - shape.padding : 0;
        const bool mirrored = flip != nullptr && flip[b];
        if (b + 1 < end) prefetch(images + index[b + 1] * shape.image_step, length);
        finish_sample(images + index[b] * shape.image_step, top, left, mirrored, scratch.data(), out + b * length);
      }
    };
    for_range(parallel, shape.count, grain_for(length * (1 + sizeof(O))), body);
  };
  if constexpr (kBytes) {
    run([&](const uint8_t* image, int64_t top, int64_t left, bool mirrored, uint8_t* scratch, O* to) {
      crop_sample(image, shape, top, left, mirrored, reorder ? scratch : to, to);
    });
  } else {
    const Values<O, C> values(mean, std, shape);
    run([&](const uint8_t* image, int64_t top, int64_t left, bool mirrored, uint8_t* scratch, O* to) {
      uint8_t* ordered = reorder ? scratch + length : scratch;
      crop_sample(image, shape, top, left, mirrored, scratch, ordered);
      values.write(ordered, length, to);
    });
  }
}

#define BBFAST_GATHER(O, C)                                                                                         \
  template void gather_augment_cpu(const uint8_t*, const int64_t*, const int64_t*, const bool*, const C*, const C*, \
                                   O*, GatherShape, ParallelFor)
BBFAST_GATHER(uint8_t, float);
BBFAST_GATHER(Half, float);
BBFAST_GATHER(BFloat16, float);
BBFAST_GATHER(float, float);
BBFAST_GATHER(double, double);

}  // namespace bbfast

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/mix.h"
#include "ops/warp/warp.h"

namespace bbfast {
namespace {

// Channels are worked on four at a time: a pixel is then one vector, and a corner is looked up once for all four.
constexpr int64_t kGroup = 4;

template <class C>
struct PixelOf {
  // Aligned as its elements are: it lies over plain arrays of them.
  using type __attribute__((vector_size(kGroup * sizeof(C)), aligned(sizeof(C)), may_alias)) = C;
};

constexpr int64_t kBlock = 16;

// Where kBlock neighbouring output pixels look: four corners each, and their weights. A corner outside the image points
// at one extra pixel behind the image, which is zero.
template <class C>
struct Looks {
  int32_t place[4][kBlock];
  C weight[4][kBlock];
};

// Truth as a mask of bits, and selection by it, so that the loop below has no branches and turns into vector
// instructions. Comparisons with NaN are false: a NaN point lies outside, and the casts see in-range values only.
template <class C>
using Mask = std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t>;

template <class C>
BBFAST_INLINE Mask<C> within(C value, C edge) {
  return -(static_cast<Mask<C>>(value >= C(0)) & static_cast<Mask<C>>(value <= edge));
}

template <class C>
BBFAST_INLINE C keep(C value, Mask<C> mask) {
  return std::bit_cast<C>(std::bit_cast<Mask<C>>(value) & mask);
}

BBFAST_INLINE int32_t choose(int32_t mask, int32_t yes, int32_t no) {
  return (yes & mask) | (no & ~mask);
}

// A coordinate brought to within two pixels of the image: farther out, as NaN too, it lies outside all the same, and
// casts see numbers that an int32 can hold.
template <class C>
BBFAST_INLINE C near_image(C value, C edge) {
  const C low = value > C(-2) ? value : C(-2);
  return low < edge + C(2) ? low : edge + C(2);
}

// std::floor does not turn into vector instructions on every level.
template <class C>
BBFAST_INLINE C floor_of(C value) {
  const C whole = static_cast<C>(static_cast<int32_t>(value));
  return whole - static_cast<C>(value < whole ? 1 : 0);
}

// The looks of the block of pixels that begins at `first`. Returns whether a point is NaN.
template <class C>
BBFAST_INLINE bool build_looks(const C* __restrict grid, int64_t first, int64_t height, int64_t width,
                               Looks<C>& looks) {
  const int64_t count = std::min(kBlock, height * width - first);
  const C right_edge = static_cast<C>(width - 1);
  const C bottom_edge = static_cast<C>(height - 1);
  const int32_t outside = static_cast<int32_t>(height * width);
  const int32_t pitch = static_cast<int32_t>(width);
  C xs[kBlock] = {};
  C ys[kBlock] = {};
  for (int64_t l = 0; l < count; ++l) {
    xs[l] = grid[2 * (first + l)];
    ys[l] = grid[2 * (first + l) + 1];
  }
  NanCount<C> nans = 0;
  for (int64_t l = 0; l < kBlock; ++l) {
    nans += xs[l] != xs[l] ? 1 : 0;
    nans += ys[l] != ys[l] ? 1 : 0;
    const C x = near_image(((xs[l] + C(1)) / C(2)) * right_edge, right_edge);
    const C y = near_image(((ys[l] + C(1)) / C(2)) * bottom_edge, bottom_edge);
    const C left = floor_of(x);
    const C top = floor_of(y);
    const C right = left + C(1);
    const C bottom = top + C(1);
    const Mask<C> in_left = within(left, right_edge);
    const Mask<C> in_right = within(right, right_edge);
    const Mask<C> in_top = within(top, bottom_edge);
    const Mask<C> in_bottom = within(bottom, bottom_edge);
    const int32_t column_left = static_cast<int32_t>(keep(left, in_left));
    const int32_t column_right = static_cast<int32_t>(keep(right, in_right));
    const int32_t row_top = static_cast<int32_t>(keep(top, in_top)) * pitch;
    const int32_t row_bottom = static_cast<int32_t>(keep(bottom, in_bottom)) * pitch;
    looks.place[0][l] = choose(static_cast<int32_t>(in_left & in_top), row_top + column_left, outside);
    looks.place[1][l] = choose(static_cast<int32_t>(in_right & in_top), row_top + column_right, outside);
    looks.place[2][l] = choose(static_cast<int32_t>(in_left & in_bottom), row_bottom + column_left, outside);
    looks.place[3][l] = choose(static_cast<int32_t>(in_right & in_bottom), row_bottom + column_right, outside);
    looks.weight[0][l] = keep((right - x) * (bottom - y), in_left & in_top);
    looks.weight[1][l] = keep((x - left) * (bottom - y), in_right & in_top);
    looks.weight[2][l] = keep((right - x) * (y - top), in_left & in_bottom);
    looks.weight[3][l] = keep((x - left) * (y - top), in_right & in_bottom);
  }
  return nans != 0;
}

template <class C>
BBFAST_CLONES bool build_field(const C* grid, int64_t height, int64_t width, Looks<C>* field) {
  bool nan = false;
  for (int64_t first = 0; first < height * width; first += kBlock) {
    nan |= build_looks(grid, first, height, width, field[first / kBlock]);
  }
  return nan;
}

// Four channels of an image to pixels. `channel` holds where each begins, `step` is the distance between its elements.
template <class T, class C>
BBFAST_INLINE bool read_pixels(const T* const* channel, int64_t step, int64_t pixels, C* __restrict to) {
  const T* a = channel[0];
  const T* b = channel[1];
  const T* c = channel[2];
  const T* d = channel[3];
  NanCount<C> nans = 0;
  for (int64_t i = 0; i < pixels; ++i) {
    const C v0 = load(a[i * step]);
    const C v1 = load(b[i * step]);
    const C v2 = load(c[i * step]);
    const C v3 = load(d[i * step]);
    to[kGroup * i] = v0;
    to[kGroup * i + 1] = v1;
    to[kGroup * i + 2] = v2;
    to[kGroup * i + 3] = v3;
    nans += v0 != v0 || v1 != v1 || v2 != v2 || v3 != v3 ? 1 : 0;
  }
  return nans != 0;
}

// The pixels of one block.
template <class C>
BBFAST_INLINE void look_up(const C* __restrict values, const Looks<C>& looks, int64_t count, C* __restrict results) {
  using Pixel = typename PixelOf<C>::type;
  const Pixel* image = reinterpret_cast<const Pixel*>(values);
  Pixel* out = reinterpret_cast<Pixel*>(results);
  for (int64_t l = 0; l < count; ++l) {
    Pixel v = image[looks.place[0][l]] * looks.weight[0][l];
    v = v + image[looks.place[1][l]] * looks.weight[1][l];
    v = v + image[looks.place[2][l]] * looks.weight[2][l];
    v = v + image[looks.place[3][l]] * looks.weight[3][l];
    out[l] = v;
  }
}

// One channel of the result.
template <class T, class C>
BBFAST_INLINE void write_channel(const C* __restrict from, int64_t pixels, int64_t step, bool truncate,
                                 T* __restrict to) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (truncate) {
      for (int64_t i = 0; i < pixels; ++i) to[i * step] = finish_truncated(from[kGroup * i]);
      return;
    }
  }
  for (int64_t i = 0; i < pixels; ++i) to[i * step] = finish<T>(from[kGroup * i]);
}

// `image` holds kGroup values for each pixel and for one more, `result` for each pixel. The looks come ready in
// `field`, or are made from `grid` where there is none. Returns what was found.
template <class T, class C>
BBFAST_CLONES int warp_sample(const T* x, const Looks<C>* field, const C* grid, const WarpShape& shape, C* image,
                              C* result, T* out) {
  const int64_t pixels = shape.height * shape.width;
  const int64_t step = shape.channels_last ? shape.channels : 1;
  const int64_t next = shape.channels_last ? 1 : pixels;
  int findings = 0;
  for (int64_t first = 0; first < shape.channels; first += kGroup) {
    const int64_t count = std::min(kGroup, shape.channels - first);
    const T* channel[kGroup];
    // A group that is not full repeats its last channel; what comes out of the copies is not written.
    for (int64_t c = 0; c < kGroup; ++c) channel[c] = x + (first + std::min(c, count - 1)) * next;
    const bool nan = step == 1 ? read_pixels(channel, 1, pixels, image) : read_pixels(channel, step, pixels, image);
    findings |= nan ? kWarpImageNan : 0;
    for (int64_t c = 0; c < kGroup; ++c) image[kGroup * pixels + c] = C(0);
    for (int64_t i = 0; i < pixels; i += kBlock) {
      const int64_t block = std::min(kBlock, pixels - i);
      if (field != nullptr) {
        look_up(image, field[i / kBlock], block, result + kGroup * i);
      } else {
        Looks<C> looks;
        if (build_looks(grid, i, shape.height, shape.width, looks)) findings |= kWarpGridNan;
        look_up(image, looks, block, result + kGroup * i);
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const C* from = result + c;
      T* to = out + (first + c) * next;
      if (step == 1) {
        write_channel(from, pixels, 1, shape.truncate, to);
      } else {
        write_channel(from, pixels, step, shape.truncate, to);
      }
    }
  }
  return findings;
}

}  // namespace

template <class T, class C>
int warp_cpu(const T* images, const C* grid, const bool* where, T* out, WarpShape shape, ParallelFor parallel) {
  const int64_t pixels = shape.height * shape.width;
  const int64_t length = pixels * shape.channels;
  const bool shared = shape.grid_stride == 0;
  std::atomic<int> findings = 0;
  std::vector<Looks<C>> field(shared ? (pixels + kBlock - 1) / kBlock : 0);
  if (shared && build_field(grid, shape.height, shape.width, field.data())) return kWarpGridNan;
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<C> image(kGroup * (pixels + 1));
    std::vector<C> result(kGroup * pixels);
    for (int64_t n = begin; n < end; ++n) {
      const T* x = images + n * length;
      T* y = out + n * length;
      if (where != nullptr && !where[n]) {
        if (pass_through(x, y, length)) findings |= kWarpImageNan;
      } else {
        findings |= warp_sample(x, shared ? field.data() : nullptr, grid + n * shape.grid_stride, shape, image.data(),
                                result.data(), y);
      }
    }
  };
  for_range(parallel, shape.samples, grain_for(length * 16), body);
  return findings;
}

template int warp_cpu(const uint8_t*, const float*, const bool*, uint8_t*, WarpShape, ParallelFor);
template int warp_cpu(const Half*, const float*, const bool*, Half*, WarpShape, ParallelFor);
template int warp_cpu(const BFloat16*, const float*, const bool*, BFloat16*, WarpShape, ParallelFor);
template int warp_cpu(const float*, const float*, const bool*, float*, WarpShape, ParallelFor);
template int warp_cpu(const double*, const double*, const bool*, double*, WarpShape, ParallelFor);

}  // namespace bbfast

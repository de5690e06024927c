#include <atomic>
#include <vector>

#include "common/mix.h"
#include "ops/patch/patch.h"

namespace bbfast {
namespace {

// The part of a plane in which a mask is not zero. A trigger is mostly small: what lies outside is copied, not
// computed.
struct Span {
  int64_t begin;
  int64_t end;
};

template <class C>
std::vector<Span> mask_spans(const C* mask, int64_t planes, int64_t length, int64_t stride) {
  std::vector<Span> spans;
  for (int64_t p = 0; p < planes; ++p) {
    const C* values = mask + p * stride;
    int64_t begin = 0;
    int64_t end = length;
    while (begin < end && values[begin] == C(0)) ++begin;
    while (end > begin && values[end - 1] == C(0)) --end;
    spans.push_back({begin, end});
  }
  return spans;
}

template <class T, class P, class C>
BBFAST_CLONES bool patch_planes(const T* images, const P* pattern, const C* mask, const bool* where, T* out,
                                const Span* spans, BatchShape shape, CompanionStride ps, CompanionStride ms,
                                int64_t begin, int64_t end) {
  bool nan = false;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / shape.planes;
    const int64_t plane = item - n * shape.planes;
    const T* x = images + item * shape.length;
    T* y = out + item * shape.length;
    if (where != nullptr && !where[n]) {
      nan |= pass_through(x, y, shape.length);
      continue;
    }
    const P* p = pattern + n * ps.sample + plane * ps.plane;
    const C* a = mask + n * ms.sample + plane * ms.plane;
    const Span s = spans[plane];
    nan |= pass_through(x, y, s.begin);
    nan |= mix_map(x + s.begin, p + s.begin, a + s.begin, y + s.begin, s.end - s.begin);
    nan |= pass_through(x + s.end, y + s.end, shape.length - s.end);
  }
  return nan;
}

}  // namespace

template <class T, class P, class C>
bool patch_cpu(const T* images, const P* pattern, const C* mask, const bool* where, T* out, BatchShape shape,
               CompanionStride ps, CompanionStride ms, ParallelFor parallel) {
  std::atomic<bool> nan = false;
  const bool one_mask = ms.sample == 0 && shape.samples > 0;
  const std::vector<Span> spans = one_mask ? mask_spans(mask, shape.planes, shape.length, ms.plane)
                                           : std::vector<Span>(shape.planes, Span{0, shape.length});
  auto body = [&](int64_t begin, int64_t end) {
    if (patch_planes(images, pattern, mask, where, out, spans.data(), shape, ps, ms, begin, end)) nan = true;
  };
  for_range(parallel, shape.samples * shape.planes, grain_for(shape.length * (2 * sizeof(T) + sizeof(C))), body);
  return nan;
}

#define BBFAST_PATCH(T, P, C)                                                                                          \
  template bool patch_cpu(const T*, const P*, const C*, const bool*, T*, BatchShape, CompanionStride, CompanionStride, \
                          ParallelFor)
BBFAST_PATCH(uint8_t, uint8_t, float);
BBFAST_PATCH(uint8_t, float, float);
BBFAST_PATCH(Half, Half, float);
BBFAST_PATCH(Half, float, float);
BBFAST_PATCH(BFloat16, BFloat16, float);
BBFAST_PATCH(BFloat16, float, float);
BBFAST_PATCH(float, float, float);
BBFAST_PATCH(double, double, double);

}  // namespace bbfast

// How a CPU kernel splits its work: the torch layer hands in a parallel-for, so kernels know nothing of torch.
#pragma once

#include <cstdint>

namespace bbfast {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Runs `body` on pieces of [begin, end) of at least `grain` items, on as many threads as the caller's pool has. Bodies
// must not throw, and must compute an item the same way whatever the piece it is in.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

template <class F>
void for_range(ParallelFor parallel, int64_t count, int64_t grain, F& body) {
  parallel(
      0, count, grain < 1 ? 1 : grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

// Items per piece so that a piece moves at least a few hundred kilobytes: less is not worth waking a thread for.
inline int64_t grain_for(int64_t bytes_per_item) {
  constexpr int64_t kPieceBytes = 128 * 1024;
  return bytes_per_item <= 0 ? 1 : (kPieceBytes + bytes_per_item - 1) / bytes_per_item;
}

}  // namespace bbfast

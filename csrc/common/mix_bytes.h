// Bytes mixed with something, tile by tile.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/scale_bytes.h"
#include "common/tiles.h"

namespace bbfast {

// out = images * scale + shift for the samples in `where`; the others are copied. `weights(tile, n, scale, shift)`
// fills the two for a tile of sample n and returns whether shift holds NaN; with `shared` it is asked once for all
// samples. Returns whether a NaN was met.
template <class Weights>
bool mix_bytes(const uint8_t* images, const bool* where, uint8_t* out, BatchShape shape, bool shared,
               ParallelFor parallel, const Weights& weights) {
  std::atomic<bool> nan = false;
  for_tiles(shape, kTileElements, kTileSamples, 2, parallel, [&](const Tile& tile) {
    alignas(64) float scale[kTileElements];
    alignas(64) float shift[kTileElements];
    int64_t begin = 0;
    int64_t end = 0;
    bool known = false;
    for (int64_t n = tile.begin; n < tile.end; ++n) {
      const uint8_t* x = images + tile.at(n, shape);
      uint8_t* y = out + tile.at(n, shape);
      if (where != nullptr && !where[n]) {
        std::copy_n(x, tile.count, y);
        continue;
      }
      if (!known) {
        if (weights(tile, n, scale, shift)) nan = true;
        begin = 0;
        end = tile.count;
        known = shared;
        // A trigger is mostly small: what lies outside is copied, not computed.
        const auto same = [&](int64_t i) { return scale[i] == 1.0f && shift[i] == 0.0f; };
        while (shared && begin < end && same(begin)) ++begin;
        while (shared && end > begin && same(end - 1)) --end;
      }
      std::copy_n(x, begin, y);
      scale_bytes(x + begin, scale + begin, shift + begin, y + begin, end - begin);
      std::copy_n(x + end, tile.count - end, y + end);
    }
  });
  return nan;
}

}  // namespace bbfast

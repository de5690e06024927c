// The order in which CPU kernels walk a batch when its samples share something: tile by tile, and within a tile sample
// by sample. What is shared then stays in the first-level cache, and what follows from it is computed once a tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/batch_shape.h"
#include "common/parallel.h"

namespace bbfast {

constexpr int64_t kTileSamples = 64;
constexpr int64_t kTileElements = 2048;  // elements; two floats and two bytes for each fill half of a first-level cache

// `count` elements of a plane from `first` on, in the samples from `begin` to `end`.
struct Tile {
  int64_t plane;
  int64_t first;
  int64_t count;
  int64_t begin;
  int64_t end;

  // Where the tile starts in sample n.
  int64_t at(int64_t n, const BatchShape& shape) const { return (n * shape.planes + plane) * shape.length + first; }
};

// Calls `body(tile)` until every element of the batch was in one tile; a tile starts at a multiple of `size`. The
// samples come in blocks, so that each thread has a stretch of memory of its own: with all samples of a tile next to
// each other, two threads would fetch ahead into each other's tiles. A block of 1 is the order in memory.
template <class F>
void for_tiles(BatchShape shape, int64_t size, int64_t samples_per_block, int64_t bytes_per_element,
               ParallelFor parallel, F&& body) {
  if (shape.samples * shape.planes * shape.length == 0) return;
  const int64_t pieces = (shape.length + size - 1) / size;
  const int64_t rows = shape.planes * pieces;
  auto range = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t block = begin / (rows * samples_per_block);
      const int64_t samples = std::min(samples_per_block, shape.samples - block * samples_per_block);
      const int64_t item = begin - block * rows * samples_per_block;
      const int64_t row = item / samples;
      const int64_t n = item - row * samples;
      const int64_t count = std::min(samples - n, end - begin);
      const int64_t plane = row / pieces;
      const int64_t first = (row - plane * pieces) * size;
      const int64_t from = block * samples_per_block + n;
      body(Tile{plane, first, std::min(size, shape.length - first), from, from + count});
      begin += count;
    }
  };
  for_range(parallel, rows * shape.samples, grain_for(std::min(size, shape.length) * bytes_per_element), range);
}

}  // namespace bbfast

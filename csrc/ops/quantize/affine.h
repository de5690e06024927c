// A rising staircase of whole numbers as one multiplication: (i * factor + offset) >> shift, all in 16 bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bbfast {

struct Affine {
  uint16_t factor = 0;
  uint16_t offset = 0;
  uint16_t shift = 0;
  bool found = false;
};

// Numbers that give `stairs` exactly for every index below `count`, if there are any. The highest shift whose products
// still fit 16 bits is the most precise; the one below it may leave more room for the offset.
template <class F>
Affine find_affine(int64_t count, F&& stairs) {
  const int64_t last = count - 1;
  int shift = 16;
  while (shift > 0 && (stairs(last) << shift) > 65535) --shift;
  for (const int lowest = std::max(0, shift - 2); shift >= lowest; --shift) {
    const int64_t slope = (stairs(last) << shift) / last;
    for (int64_t factor = std::max<int64_t>(0, slope - 2); factor <= slope + 3; ++factor) {
      int64_t low = 0;
      int64_t high = 65535 - last * factor;
      for (int64_t i = 0; i < count && low <= high; ++i) {
        low = std::max(low, (stairs(i) << shift) - i * factor);
        high = std::min(high, ((stairs(i) + 1) << shift) - i * factor - 1);
      }
      if (low > high) continue;
      return {static_cast<uint16_t>(factor), static_cast<uint16_t>(low), static_cast<uint16_t>(shift), true};
    }
  }
  return {};
}

// Byte to step, and step to level.
struct ByteLevels {
  Affine step;
  Affine level;

  bool found() const { return step.found && level.found; }
};

// Whole-number arithmetic is exact: a byte never lies half way between two levels (2 * byte * steps is even, 255 times
// an odd number is not).
inline ByteLevels find_byte_levels(int64_t steps, bool truncate) {
  const auto step = [&](int64_t byte) { return (2 * byte * steps + 255) / 510; };
  const auto level = [&](int64_t i) {
    const int64_t whole = 255 * i / steps;
    const int64_t twice = 2 * (255 * i - whole * steps);  // the rest against one half
    if (truncate || twice < steps) return whole;
    return twice > steps ? whole + 1 : whole + (whole & 1);
  };
  ByteLevels levels{find_affine(256, step), {}};
  if (levels.step.found) levels.level = find_affine(steps + 1, level);
  return levels;
}

}  // namespace bbfast

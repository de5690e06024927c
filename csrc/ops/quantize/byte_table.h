// A byte for each byte.
#pragma once

#include <array>
#include <cstdint>

namespace bbfast {

using ByteTable = std::array<uint8_t, 256>;

// Whether this processor looks up 64 bytes at once; else arithmetic is faster than a table.
bool has_fast_byte_table();

// out[i] = table[x[i]]
void look_up_bytes(const ByteTable& table, const uint8_t* x, uint8_t* out, int64_t count);

}  // namespace bbfast

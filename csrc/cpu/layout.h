// QNB_LAYOUT_S8_N32K64 and QNB_LAYOUT_CODES_N32K64 in numbers; include/qnb.h says what they are and why.
#pragma once

#include <cstdint>

namespace qnb {

constexpr int64_t panel_outputs = 32;                           // outputs of a panel
constexpr int64_t block_k = 64;                                 // k of a block
constexpr int64_t line_bytes = 64;                              // 16 outputs x 4 k
constexpr int64_t half_bytes = 16 * line_bytes;                 // 16 outputs x 64 k: one tile
constexpr int64_t block_bytes = 2 * half_bytes;                 // 32 outputs x 64 k
static_assert(block_bytes == panel_outputs * block_k);

// A block of codes of `bits` bits.
constexpr int64_t codes_block_bytes(int64_t bits) { return block_bytes * bits / 8; }

}  // namespace qnb

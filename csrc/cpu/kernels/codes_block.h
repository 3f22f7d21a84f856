// A block of QNB_LAYOUT_CODES_N32K64 as bytes, in plain C++: one code each, in the order of QNB_LAYOUT_S8_N32K64. Included
// by code of any instruction set, hence all in an anonymous namespace.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace {

// Codes of Bits bits (2 or 4): byte i holds codes i, i + bytes, i + 2 * bytes ... from its low bits up.
template <int Bits>
void split_bytes(const uint8_t* __restrict packed, uint8_t* __restrict codes) {
  constexpr int64_t bytes = qnb::codes_block_bytes(Bits);
  for (int part = 0; part < 8 / Bits; ++part) {
    for (int64_t i = 0; i < bytes; ++i) {
      codes[part * bytes + i] = static_cast<uint8_t>(packed[i] >> part * Bits & ((1 << Bits) - 1));
    }
  }
}

// Codes of 3 bits: for 16 k of both halves three lines of bytes, which are the low, middle and high bytes of 64 words. A
// word holds 8 codes, 64 places apart, those of the first half in its lower bits.
void split_words(const uint8_t* __restrict packed, uint8_t* __restrict codes) {
  for (int64_t quad = 0; quad < 4; ++quad) {
    const uint8_t* from = packed + quad * 3 * qnb::line_bytes;
    for (int64_t i = 0; i < qnb::line_bytes; ++i) {
      const uint32_t word = from[i] | from[qnb::line_bytes + i] << 8 | from[2 * qnb::line_bytes + i] << 16;
      for (int64_t j = 0; j < 8; ++j) {
        codes[j / 4 * qnb::half_bytes + (quad * 4 + j % 4) * qnb::line_bytes + i] =
            static_cast<uint8_t>(word >> 3 * j & 7);
      }
    }
  }
}

void unpack_block(const uint8_t* __restrict packed, int64_t bits, uint8_t* __restrict codes) {
  switch (bits) {
    case 2:
      return split_bytes<2>(packed, codes);
    case 4:
      return split_bytes<4>(packed, codes);
    case 3:
      return split_words(packed, codes);
    default:
      for (int64_t i = 0; i < qnb::block_bytes; ++i) codes[i] = packed[i];
  }
}

}  // namespace

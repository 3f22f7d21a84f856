// Both jobs of group_codes in plain C++, which a compiler turns into vectors of the instruction set that the including
// kernel file is compiled for.
#pragma once

#include <cstdint>

#include "../kernel.h"
#include "codes_block.h"

namespace {

void decode_s8(const uint8_t* packed, int32_t bits, int64_t blocks, int8_t* s8) {
  const int64_t bytes = qnb::codes_block_bytes(bits);
  const uint8_t middle = static_cast<uint8_t>(1 << (bits - 1));
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t codes[qnb::block_bytes];
    unpack_block(packed + block * bytes, bits, codes);
    int8_t* __restrict to = s8 + block * qnb::block_bytes;
    for (int64_t i = 0; i < qnb::block_bytes; ++i) to[i] = static_cast<int8_t>(codes[i] - middle);
  }
}

template <bool Accumulate>
void add_scaled_rows(const qnb::AddScaledArgs& args) {
  for (int64_t m = 0; m < args.rows; ++m) {
    const int32_t* __restrict acc = args.acc + m * args.ld;
    const float* __restrict scale = args.scale;
    float* __restrict total = args.total + m * args.ld;
    for (int64_t n = 0; n < args.columns; ++n) {
      const float product = static_cast<float>(acc[n]) * scale[n];
      total[n] = Accumulate ? total[n] + product : product;
    }
  }
}

void add_scaled(const qnb::AddScaledArgs& args) {
  if (args.accumulate) return add_scaled_rows<true>(args);
  add_scaled_rows<false>(args);
}

}  // namespace

// Codes into QNB_LAYOUT_CODES_N32K64 and back, block by block through bytes. Done once per layer.
#include <atomic>
#include <cstring>

#include "codes.h"
#include "kernels/codes_block.h"
#include "parallel.h"
#include "sizes.h"

namespace qnb {
namespace {

constexpr double ns_per_code = 1;

// Calls move(place of 4 codes in the block, output n, first k, how many of the 4 lie inside K) for a block.
template <class Move>
void walk_block(int64_t panel, int64_t block, int64_t N, int64_t K, const Move& move) {
  for (int64_t row = 0; row < panel_outputs; ++row) {
    const int64_t n = panel * panel_outputs + row, place = row / 16 * half_bytes + row % 16 * 4;
    for (int64_t group = 0; group < 16; ++group) {
      const int64_t k = block * block_k + group * 4;
      move(place + group * line_bytes, n, k, n >= N || k >= K ? 0 : K - k < 4 ? K - k : 4);
    }
  }
}

// Undoes split_bytes.
template <int Bits>
void join_bytes(const uint8_t* codes, uint8_t* packed) {
  constexpr int64_t bytes = codes_block_bytes(Bits);
  for (int64_t i = 0; i < bytes; ++i) {
    unsigned byte = 0;
    for (int part = 0; part < 8 / Bits; ++part) byte |= static_cast<unsigned>(codes[part * bytes + i]) << part * Bits;
    packed[i] = static_cast<uint8_t>(byte);
  }
}

// Undoes split_words.
void join_words(const uint8_t* codes, uint8_t* packed) {
  for (int64_t quad = 0; quad < 4; ++quad) {
    for (int64_t i = 0; i < line_bytes; ++i) {
      uint32_t word = 0;
      for (int64_t j = 0; j < 8; ++j) {
        word |= uint32_t{codes[j / 4 * half_bytes + (quad * 4 + j % 4) * line_bytes + i]} << 3 * j;
      }
      for (int64_t byte = 0; byte < 3; ++byte) {
        packed[(quad * 3 + byte) * line_bytes + i] = static_cast<uint8_t>(word >> 8 * byte);
      }
    }
  }
}

void pack_block(const uint8_t* codes, int32_t bits, uint8_t* packed) {
  switch (bits) {
    case 2:
      return join_bytes<2>(codes, packed);
    case 3:
      return join_words(codes, packed);
    case 4:
      return join_bytes<4>(codes, packed);
    default:
      std::memcpy(packed, codes, static_cast<size_t>(block_bytes));
  }
}

// Calls work(panel, block, where the block lies in the packed codes) for each block.
template <class Work>
void for_blocks(int64_t N, int64_t K, int32_t bits, const qnb_parallel* parallel, const Work& work) {
  const int64_t panels = panels_of(N), blocks = k_blocks_of(K);
  const double ns = ns_per_code * static_cast<double>(panels * blocks * block_bytes);
  for_shares(parallel, shares_for(ns, panels, parallel), panels, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; ++panel) {
      for (int64_t block = 0; block < blocks; ++block) {
        work(panel, block, (panel * blocks + block) * codes_block_bytes(bits));
      }
    }
  });
}

bool all_fit(const uint8_t* codes, int64_t count, int32_t bits) {
  unsigned all = 0;
  for (int64_t i = 0; i < count; ++i) all |= codes[i];
  return all >> bits == 0;
}

}  // namespace
}  // namespace qnb

extern "C" {

int64_t qnb_packed_codes_bytes(int64_t N, int64_t K, int32_t bits) {
  if (!qnb::sizes_fit(0, N, K)) return QNB_ERROR_SIZE;
  if (!qnb::is_bits(bits)) return QNB_ERROR_BITS;
  return qnb::panels_of(N) * qnb::k_blocks_of(K) * qnb::codes_block_bytes(bits);
}

int32_t qnb_pack_codes(const uint8_t* codes, int64_t N, int64_t K, int32_t bits, uint8_t* packed,
                       const qnb_parallel* parallel) {
  using namespace qnb;
  const int64_t bytes = qnb_packed_codes_bytes(N, K, bits);
  if (bytes <= 0) return static_cast<int32_t>(bytes);
  if (codes == nullptr || packed == nullptr) return QNB_ERROR_NULL;
  if (!all_fit(codes, N * K, bits)) return QNB_ERROR_CODE;
  for_blocks(N, K, bits, parallel, [&](int64_t panel, int64_t block, int64_t at) {
    uint8_t of_block[block_bytes] = {};
    walk_block(panel, block, N, K, [&](int64_t place, int64_t n, int64_t k, int64_t inside) {
      if (inside > 0) std::memcpy(of_block + place, codes + n * K + k, static_cast<size_t>(inside));
    });
    pack_block(of_block, bits, packed + at);
  });
  return QNB_OK;
}

int32_t qnb_unpack_codes(const uint8_t* packed, int64_t N, int64_t K, int32_t bits, uint8_t* codes,
                         const qnb_parallel* parallel) {
  using namespace qnb;
  const int64_t bytes = qnb_packed_codes_bytes(N, K, bits);
  if (bytes <= 0) return static_cast<int32_t>(bytes);
  if (codes == nullptr || packed == nullptr) return QNB_ERROR_NULL;
  for_blocks(N, K, bits, parallel, [&](int64_t panel, int64_t block, int64_t at) {
    uint8_t of_block[block_bytes];
    unpack_block(packed + at, bits, of_block);
    walk_block(panel, block, N, K, [&](int64_t place, int64_t n, int64_t k, int64_t inside) {
      if (inside > 0) std::memcpy(codes + n * K + k, of_block + place, static_cast<size_t>(inside));
    });
  });
  return QNB_OK;
}

}  // extern "C"

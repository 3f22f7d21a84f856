// Weights into QNB_LAYOUT_S8_N32K64 and back. Done once per layer, so plain loops over 4-byte groups are enough.
#include <cstring>

#include "../include/qnb.h"
#include "layout.h"
#include "parallel.h"
#include "sizes.h"

namespace qnb {
namespace {

constexpr double ns_per_byte = 0.5;

// Calls move(place of 4 bytes in the packed panel, output n, first k, how many of the 4 lie inside K) for a panel.
template <class Move>
void walk_panel(int64_t panel, int64_t N, int64_t K, const Move& move) {
  for (int64_t block = 0; block < k_blocks_of(K); ++block) {
    for (int64_t row = 0; row < panel_outputs; ++row) {
      const int64_t n = panel * panel_outputs + row;
      const int64_t place = block * block_bytes + row / 16 * half_bytes + row % 16 * 4;
      for (int64_t group = 0; group < 16; ++group) {
        const int64_t k = block * block_k + group * 4;
        const int64_t inside = n >= N || k >= K ? 0 : K - k < 4 ? K - k : 4;
        move(place + group * line_bytes, n, k, inside);
      }
    }
  }
}

}  // namespace
}  // namespace qnb

extern "C" {

int64_t qnb_packed_w8_bytes(int64_t N, int64_t K) {
  if (!qnb::sizes_fit(0, N, K)) return QNB_ERROR_SIZE;
  return qnb::panels_of(N) * qnb::k_blocks_of(K) * qnb::block_bytes;
}

int32_t qnb_pack_w8(const int8_t* w, int64_t N, int64_t K, int8_t* packed, const qnb_parallel* parallel) {
  using namespace qnb;
  if (!sizes_fit(0, N, K)) return QNB_ERROR_SIZE;
  const int64_t bytes = qnb_packed_w8_bytes(N, K), panels = panels_of(N);
  if (bytes == 0) return QNB_OK;
  if (w == nullptr || packed == nullptr) return QNB_ERROR_NULL;
  const int64_t shares = shares_for(ns_per_byte * static_cast<double>(bytes), panels, parallel);
  for_shares(parallel, shares, panels, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; ++panel) {
      int8_t* to = packed + panel * k_blocks_of(K) * block_bytes;
      walk_panel(panel, N, K, [&](int64_t place, int64_t n, int64_t k, int64_t inside) {
        if (inside < 4) std::memset(to + place, 0, 4);
        if (inside == 4) {
          std::memcpy(to + place, w + n * K + k, 4);
        } else if (inside > 0) {
          std::memcpy(to + place, w + n * K + k, static_cast<size_t>(inside));
        }
      });
    }
  });
  return QNB_OK;
}

int32_t qnb_unpack_w8(const int8_t* packed, int64_t N, int64_t K, int8_t* w, const qnb_parallel* parallel) {
  using namespace qnb;
  if (!sizes_fit(0, N, K)) return QNB_ERROR_SIZE;
  const int64_t bytes = qnb_packed_w8_bytes(N, K), panels = panels_of(N);
  if (bytes == 0) return QNB_OK;
  if (w == nullptr || packed == nullptr) return QNB_ERROR_NULL;
  const int64_t shares = shares_for(ns_per_byte * static_cast<double>(bytes), panels, parallel);
  for_shares(parallel, shares, panels, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; ++panel) {
      const int8_t* from = packed + panel * k_blocks_of(K) * block_bytes;
      walk_panel(panel, N, K, [&](int64_t place, int64_t n, int64_t k, int64_t inside) {
        if (inside == 4) {
          std::memcpy(w + n * K + k, from + place, 4);
        } else if (inside > 0) {
          std::memcpy(w + n * K + k, from + place, static_cast<size_t>(inside));
        }
      });
    }
  });
  return QNB_OK;
}

}  // extern "C"

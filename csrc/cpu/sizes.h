// Arithmetic on sizes that the drivers share. Baseline code only: kernels do not include it.
#pragma once

#include <cstdint>

#include "../include/qnb.h"
#include "layout.h"

namespace qnb {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t panels_of(int64_t N) { return ceil_div(N, panel_outputs); }
constexpr int64_t k_blocks_of(int64_t K) { return ceil_div(K, block_k); }

// How far apart rows of K elements lie in scratch: padded to whole blocks, and an odd number of blocks, because rows a
// power of two apart fall on the same lines of the first cache, which holds only eight or twelve such.
constexpr int64_t row_stride(int64_t K) { return (k_blocks_of(K) | 1) * block_k; }

// Whether the rows of a caller's contiguous (M, K) can be used where they lie.
constexpr bool rows_usable(int64_t M, int64_t K) { return K % block_k == 0 && (M <= 8 || row_stride(K) == K); }

// Whether M, N, K are sizes of matrices whose bytes, f32 and padded, can be counted in int64.
constexpr bool sizes_fit(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t limit = int64_t{1} << 58;
  const auto product_fits = [](int64_t a, int64_t b) { return a == 0 || b + 64 <= limit / (a + 64); };
  return M >= 0 && N >= 0 && K >= 0 && M < limit && N < limit && K < limit && product_fits(M, N) &&
         product_fits(M, K) && product_fits(N, K);
}

constexpr bool is_dtype(int32_t dtype) { return dtype == QNB_F32 || dtype == QNB_BF16 || dtype == QNB_F16; }
constexpr int64_t bytes_of(int32_t dtype) { return dtype == QNB_F32 ? 4 : 2; }

}  // namespace qnb

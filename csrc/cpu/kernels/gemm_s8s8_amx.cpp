// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], for all m < rows, n < 32 * panels, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmS8S8, and that the process was granted the tile registers
// (cpu/isa.cpp asks). tdpbssd multiplies s8 by s8 and adds to s32 without saturating: exact for every code and weight.
// Why it is fast: 32 rows x 32 outputs of sums stay in four tiles; a step of 64 k loads two tiles of codes and two of
// weights for four tdpbssd, the least traffic that eight tile registers allow. A KiB of the packed weight is a tile as
// it lies in memory. A piece of a panel stays in the first cache while all rows pass by.
// The tile configuration belongs to the thread: it is set here and released here, so that nobody else's code runs with
// it. Rows behind the last 32 get a configuration with fewer rows, so that nothing outside the matrices is touched.
#include <immintrin.h>

#include "../kernel.h"

namespace {

using qnb::GemmS8S8Args;

// Tiles: 0 to 3 sums (upper rows left, right, lower rows left, right), 4 and 5 codes (upper, lower), 6 and 7 weights
// (left, right).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int64_t upper, int64_t lower) {
    const int64_t heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
      // A tile of no rows must have no columns either: it stays unconfigured, and is not used.
      rows[tile] = static_cast<uint8_t>(heights[tile]);
      bytes_per_row[tile] = heights[tile] == 0 ? 0 : 64;
    }
  }
};
static_assert(sizeof(TileConfig) == 64);

// All 16 + `lower` rows (or up to 16, without Lower) of the configuration in force, by 32 outputs.
template <bool Lower>
void multiply(const GemmS8S8Args& args, const int8_t* a, const int8_t* b, int32_t* acc) {
  const int64_t stride = args.ld_acc * static_cast<int64_t>(sizeof *acc);
  int32_t* lower_acc = acc + 16 * args.ld_acc;
  if (args.accumulate) {
    _tile_loadd(0, acc, stride);
    _tile_loadd(1, acc + 16, stride);
    if constexpr (Lower) {
      _tile_loadd(2, lower_acc, stride);
      _tile_loadd(3, lower_acc + 16, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Lower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    _tile_loadd(6, b, qnb::line_bytes);
    _tile_loadd(4, a, args.lda);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + qnb::half_bytes, qnb::line_bytes);
    _tile_dpbssd(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, a + 16 * args.lda, args.lda);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    a += qnb::block_k;
    b += qnb::block_bytes;
  }
  _tile_stored(0, acc, stride);
  _tile_stored(1, acc + 16, stride);
  if constexpr (Lower) {
    _tile_stored(2, lower_acc, stride);
    _tile_stored(3, lower_acc + 16, stride);
  }
}

void gemm(const GemmS8S8Args& args) {
  const int64_t full = args.rows / 32 * 32, rest = args.rows - full;
  const TileConfig for_full(16, 16), for_rest(rest < 16 ? rest : 16, rest < 16 ? 0 : rest - 16);
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int8_t* b = args.b + panel * args.panel_stride;
    int32_t* acc = args.acc + panel * qnb::panel_outputs;
    // Set anew only where it changes: once for all panels unless there are both full tiles and a rest.
    if (full > 0 && (panel == 0 || rest > 0)) _tile_loadconfig(&for_full);
    for (int64_t m = 0; m < full; m += 32) multiply<true>(args, args.a + m * args.lda, b, acc + m * args.ld_acc);
    if (rest == 0) continue;
    if (full > 0 || panel == 0) _tile_loadconfig(&for_rest);
    if (rest > 16) {
      multiply<true>(args, args.a + full * args.lda, b, acc + full * args.ld_acc);
    } else {
      multiply<false>(args, args.a + full * args.lda, b, acc + full * args.ld_acc);
    }
  }
  _tile_release();
}

}  // namespace

// Up to 8 rows the weights come from memory more slowly than vpdpbusd can use them, and tiles would be half empty.
QNB_KERNEL(gemm_s8s8_amx) = {.op = qnb::Op::gemm_s8s8,
                             .min_rows = 9,
                             .cuts = {.rows = 256, .panels = 16, .k_blocks = 16},
                             .gemm_s8s8 = gemm};

// The f32 product of rows of activations with a piece of a panel's weights that was made f32 before. For avx512 kernels
// only.
//
// For each output, k = 4 g + j is summed over g for each j apart, by fused multiply-add, then the four sums are added
// as (0 + 1) + (2 + 3).
// Why it is fast: sixteen neighbouring numbers of the packed order are 4 outputs x 4 k. They meet four neighbouring
// activations, broadcast as one: a lane sums one (output, j), and nothing is shuffled. A piece of 16 outputs x 256 k is
// 16 KiB that stay in the first cache while all rows pass by, six rows at a time with their 24 registers of sums, which
// wait in memory from one piece to the next.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../kernel.h"

namespace {

constexpr int64_t max_rows = 64;
constexpr int tile_rows = 6;
constexpr int64_t piece_blocks = 4;
constexpr int64_t piece_floats = piece_blocks * 16 * 64;

__m512 broadcast4(const float* a) { return _mm512_broadcast_f32x4(_mm_loadu_ps(a)); }

struct Floats {
  const float* b;
  static constexpr int64_t block_step = 16 * 64;
  __m512 load(int64_t group, int quarter) const { return _mm512_loadu_ps(b + group * 64 + quarter * 16); }
};

// sum[h][r][q] lane 4 i + j += a[r, 4 g + j] * w[16 h + 4 q + i, 4 g + j], over all g of `blocks` blocks.
template <int Halves, int Rows, class Weights>
void add_products(__m512 (&sum)[Halves][Rows][4], const float* a, int64_t lda, Weights w, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    // The next half of a block begins where this one's 16 groups end: weights are read strictly front to back.
#pragma GCC unroll 2
    for (int h = 0; h < Halves; ++h) {
      for (int64_t group = 0; group < 16; ++group) {
        const int64_t g = group + 16 * h;
        const __m512 w0 = w.load(g, 0), w1 = w.load(g, 1), w2 = w.load(g, 2), w3 = w.load(g, 3);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
          const __m512 x = broadcast4(a + r * lda + group * 4);
          sum[h][r][0] = _mm512_fmadd_ps(x, w0, sum[h][r][0]);
          sum[h][r][1] = _mm512_fmadd_ps(x, w1, sum[h][r][1]);
          sum[h][r][2] = _mm512_fmadd_ps(x, w2, sum[h][r][2]);
          sum[h][r][3] = _mm512_fmadd_ps(x, w3, sum[h][r][3]);
        }
      }
    }
    a += qnb::block_k;
    w.b += Weights::block_step;
  }
}

// The four sums of each output become one, in the order of the outputs.
__m512 fold(const __m512 (&sum)[4]) {
  __m512 pairs[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    // Lanes 4 i and 4 i + 1 hold 0 + 1, lanes 4 i + 2 and 4 i + 3 hold 2 + 3.
    const __m512 both = _mm512_add_ps(sum[q], _mm512_permute_ps(sum[q], 0xB1));
    pairs[q] = _mm512_add_ps(both, _mm512_permute_ps(both, 0x4E));
  }
  // Lane 4 i + q of the result so far is output 4 q + i: a transpose of 4 x 4 lanes.
  const __m512 low = _mm512_mask_blend_ps(0xAAAA, pairs[0], pairs[1]);
  const __m512 high = _mm512_mask_blend_ps(0x8888, pairs[2], pairs[3]);
  const __m512 mixed = _mm512_mask_blend_ps(0xCCCC, low, high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, mixed);
}

// More rows: one piece of K, continuing the sums that wait in `waiting` (Rows x 64).
template <int Rows>
void from_floats(const float* a, int64_t lda, const float* piece, int64_t blocks, bool first, float* waiting) {
  __m512 sum[1][Rows][4] = {};
  if (!first) {
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[0][r][q] = _mm512_loadu_ps(waiting + r * 64 + q * 16);
    }
  }
  add_products<1, Rows>(sum, a, lda, Floats{piece}, blocks);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) _mm512_storeu_ps(waiting + r * 64 + q * 16, sum[0][r][q]);
  }
}

using FromFloats = void(const float*, int64_t, const float*, int64_t, bool, float*);

// By number of rows.
constexpr FromFloats* from_floats_rows[tile_rows + 1] = {nullptr,        from_floats<1>, from_floats<2>, from_floats<3>,
                                                         from_floats<4>, from_floats<5>, from_floats<6>};

// acc (rows x 32) of a panel. fill(first block, blocks, piece) writes a piece, 16 outputs x 64 * blocks k for each half.
template <class Fill>
void multiply_pieces(const float* a, int64_t lda, int64_t rows, int64_t k_blocks, float* acc, int64_t ld_acc,
                     const Fill& fill) {
  // Tiles of nearly equal height: a last one of a row or two would wait for latency.
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  alignas(64) float piece[2][piece_floats];
  alignas(64) float waiting[2][max_rows * 64];
  for (int64_t block = 0; block < k_blocks; block += piece_blocks) {
    const int64_t left = k_blocks - block, blocks = left < piece_blocks ? left : piece_blocks;
    // Both halves in one pass, so that the weights are read strictly front to back.
    fill(block, blocks, piece);
    for (int half = 0; half < 2; ++half) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m = rows * tile / tiles, end = rows * (tile + 1) / tiles;
        from_floats_rows[end - m](a + m * lda + block * qnb::block_k, lda, piece[half], blocks, block == 0,
                                  waiting[half] + m * 64);
      }
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int half = 0; half < 2; ++half) {
      __m512 sum[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[q] = _mm512_load_ps(waiting[half] + m * 64 + q * 16);
      _mm512_storeu_ps(acc + m * ld_acc + half * 16, fold(sum));
    }
  }
}

void set_zero(float* acc, int64_t rows, int64_t ld_acc) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < qnb::panel_outputs; ++n) acc[m * ld_acc + n] = 0.0f;
  }
}

}  // namespace

// The f32 product of rows of activations with a piece of a panel's weights that was made f32 before. For avx2 kernels
// only.
//
// The order of the sum is that of gemm_f32_avx512.h, so the bits are the same.
// Why it is fast: eight neighbouring numbers of the packed order are 2 outputs x 4 k. They meet four neighbouring
// activations, broadcast as one: a lane sums one (output, j), and nothing is shuffled. A piece of 16 outputs x 256 k is
// 16 KiB that stay in the first cache while all rows pass by, six rows x 4 outputs at a time with their 12 registers of
// sums, which wait in memory from one piece to the next.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../kernel.h"

namespace {

constexpr int64_t max_rows = 64;
constexpr int tile_rows = 6;
constexpr int64_t piece_blocks = 4;
constexpr int64_t piece_floats = piece_blocks * 16 * 64;

__m256 broadcast4(const float* a) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(a)); }

// The four sums of each of eight outputs become one, in the order of the outputs.
__m256 fold(__m256 s0, __m256 s1, __m256 s2, __m256 s3) {
  // Adding neighbours works on each half of a register alone: outputs 0 2 4 6, then 1 3 5 7.
  const __m256 mixed = _mm256_hadd_ps(_mm256_hadd_ps(s0, s1), _mm256_hadd_ps(s2, s3));
  return _mm256_permutevar8x32_ps(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// One piece of K for 16 outputs, continuing the sums that wait in `waiting` (Rows x 64); a pass sums 2 * Vectors
// outputs.
template <int Rows, int Vectors>
void from_floats(const float* a, int64_t lda, const float* piece, int64_t groups, bool first, float* waiting) {
  for (int pass = 0; pass < 8; pass += Vectors) {
    __m256 sum[Rows][Vectors] = {};
    if (!first) {
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm256_load_ps(waiting + r * 64 + (pass + v) * 8);
      }
    }
    const float *x = a, *w = piece + pass * 8;
    for (int64_t group = 0; group < groups; ++group) {
      __m256 weights[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weights[v] = _mm256_load_ps(w + v * 8);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m256 four = broadcast4(x + r * lda);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm256_fmadd_ps(four, weights[v], sum[r][v]);
      }
      x += 4;
      w += 64;
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) _mm256_store_ps(waiting + r * 64 + (pass + v) * 8, sum[r][v]);
    }
  }
}

using FromFloats = void(const float*, int64_t, const float*, int64_t, bool, float*);

// By number of rows: enough sums to hide the latency of a fused multiply-add.
constexpr FromFloats* from_floats_rows[tile_rows + 1] = {
    nullptr,           from_floats<1, 4>, from_floats<2, 4>, from_floats<3, 2>,
    from_floats<4, 2>, from_floats<5, 2>, from_floats<6, 2>};

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
        from_floats_rows[end - m](a + m * lda + block * qnb::block_k, lda, piece[half], blocks * 16, block == 0,
                                  waiting[half] + m * 64);
      }
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int eight = 0; eight < 4; ++eight) {
      const float* s = waiting[eight / 2] + m * 64 + eight % 2 * 32;
      _mm256_storeu_ps(acc + m * ld_acc + eight * 8, fold(_mm256_load_ps(s), _mm256_load_ps(s + 8),
                                                          _mm256_load_ps(s + 16), _mm256_load_ps(s + 24)));
    }
  }
}

void set_zero(float* acc, int64_t rows, int64_t ld_acc) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < qnb::panel_outputs; ++n) acc[m * ld_acc + n] = 0.0f;
  }
}

}  // namespace

// acc[m,n] = sum over k of a[m,k] * f32(w[n,k]) in f32, for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32S8, and rows <= max_rows.
// gemm_f32_avx512.h says in which order the sum is taken. It is the same on both paths below, and so does not depend on
// the number of rows.
// Why it is fast: weights are widened in one instruction from memory, read strictly front to back. One row waits for
// memory alone: its weights are widened in registers. With more, a piece is widened once, for all rows.
#include "gemm_f32_avx2.h"

namespace {

using qnb::GemmF32S8Args;

// How far ahead of its use a line of weights is asked for while one row makes the product wait for memory.
constexpr int64_t prefetch_bytes = 4096;

// Eight bytes of the packed weight: 2 outputs x 4 k.
__m256 widen(const int8_t* bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
}

void one_row(const GemmF32S8Args& args) {
  __m256 sum[2][8] = {};
  const float* a = args.a;
  const int8_t* b = args.b;
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    // The sums of both halves do not fit the registers: one half's wait while the other's kilobyte passes by.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      for (int64_t group = 0; group < 16; ++group) {
        _mm_prefetch(reinterpret_cast<const char*>(b + prefetch_bytes), _MM_HINT_T0);
        const __m256 x = broadcast4(a + group * 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[half][i] = _mm256_fmadd_ps(x, widen(b + i * 8), sum[half][i]);
        b += qnb::line_bytes;
      }
    }
    a += qnb::block_k;
  }
#pragma GCC unroll 4
  for (int eight = 0; eight < 4; ++eight) {
    const __m256* s = sum[eight / 2] + eight % 2 * 4;
    _mm256_storeu_ps(args.acc + eight * 8, fold(s[0], s[1], s[2], s[3]));
  }
}

void gemm(const GemmF32S8Args& args) {
  if (args.rows == 1) return one_row(args);
  if (args.k_blocks == 0) return set_zero(args.acc, args.rows, args.ld_acc);
  multiply_pieces(args.a, args.lda, args.rows, args.k_blocks, args.acc, args.ld_acc,
                  [&](int64_t block, int64_t blocks, float (&piece)[2][piece_floats]) {
                    const int8_t* from = args.b + block * qnb::block_bytes;
                    for (int64_t line = 0; line < blocks * 32; ++line) {
                      float* to = piece[line / 16 % 2] + (line / 32 * 16 + line % 16) * 64;
#pragma GCC unroll 8
                      for (int i = 0; i < 8; ++i) {
                        _mm256_store_ps(to + i * 8, widen(from + line * qnb::line_bytes + i * 8));
                      }
                    }
                  });
}

}  // namespace

QNB_KERNEL(gemm_f32s8_avx2) = {.op = qnb::Op::gemm_f32s8, .cuts = {.rows = max_rows}, .gemm_f32s8 = gemm};

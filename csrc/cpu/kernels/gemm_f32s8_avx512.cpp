// acc[m,n] = sum over k of a[m,k] * f32(w[n,k]) in f32, for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32S8, and rows <= max_rows.
// gemm_f32_avx512.h says in which order the sum is taken. It is the same on both paths below, and so does not depend on
// the number of rows.
// Why it is fast: weights are widened in one instruction from memory, read strictly front to back. With few rows that
// happens in registers, both halves of a panel in one pass while registers suffice. With more, a piece is widened once,
// for all rows.
#include "gemm_f32_avx512.h"

namespace {

using qnb::GemmF32S8Args;

// How far ahead of its use a line of weights is asked for while few rows make the product wait for memory.
constexpr int64_t prefetch_bytes = 4096;

// Sixteen bytes of the packed weight: 4 outputs x 4 k.
__m512 widen(const int8_t* bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

struct Bytes {
  const int8_t* b;
  static constexpr int64_t block_step = qnb::block_bytes;
  __m512 load(int64_t group, int quarter) const {
    if (quarter == 0) {
      _mm_prefetch(reinterpret_cast<const char*>(b + group * qnb::line_bytes + prefetch_bytes), _MM_HINT_T0);
    }
    return widen(b + group * qnb::line_bytes + quarter * 16);
  }
};

// Few rows: all of K at once, the weights widened in registers.
template <int Halves, int Rows>
void from_bytes(const GemmF32S8Args& args) {
  for (int half = 0; half < 2; half += Halves) {
    __m512 sum[Halves][Rows][4] = {};
    add_products<Halves, Rows>(sum, args.a, args.lda, Bytes{args.b + half * qnb::half_bytes}, args.k_blocks);
#pragma GCC unroll 2
    for (int h = 0; h < Halves; ++h) {
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        _mm512_storeu_ps(args.acc + r * args.ld_acc + (half + h) * 16, fold(sum[h][r]));
      }
    }
  }
}

using FromBytes = void(const GemmF32S8Args&);

// By number of rows.
constexpr FromBytes* from_bytes_rows[tile_rows + 1] = {nullptr,          from_bytes<2, 1>, from_bytes<2, 2>,
                                                       from_bytes<2, 3>, from_bytes<1, 4>, from_bytes<1, 5>,
                                                       from_bytes<1, 6>};

void gemm(const GemmF32S8Args& args) {
  if (args.rows <= tile_rows) return from_bytes_rows[args.rows](args);
  if (args.k_blocks == 0) return set_zero(args.acc, args.rows, args.ld_acc);
  multiply_pieces(args.a, args.lda, args.rows, args.k_blocks, args.acc, args.ld_acc,
                  [&](int64_t block, int64_t blocks, float (&piece)[2][piece_floats]) {
                    const Bytes bytes = {args.b + block * qnb::block_bytes};
                    for (int64_t line = 0; line < blocks * 32; ++line) {
                      float* to = piece[line / 16 % 2] + (line / 32 * 16 + line % 16) * 64;
#pragma GCC unroll 4
                      for (int q = 0; q < 4; ++q) _mm512_store_ps(to + q * 16, bytes.load(line, q));
                    }
                  });
}

}  // namespace

QNB_KERNEL(gemm_f32s8_avx512) = {.op = qnb::Op::gemm_f32s8, .cuts = {.rows = max_rows}, .gemm_f32s8 = gemm};

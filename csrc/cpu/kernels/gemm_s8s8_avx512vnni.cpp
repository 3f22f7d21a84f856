// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], for all m < rows, n < 32 * panels, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmS8S8, and rows <= max_rows.
// vpdpbusd multiplies u8 by s8. The weights are made u8 by flipping their top bit, w + 128, on the way from memory, and
//   sum a * w = sum a * (w + 128) - 128 * sum a
// takes that away again: one more number for each row, and none to store with the weights. All of it modulo 2^32,
// where vpdpbusd, which does not saturate, is exact; the result fits, by the limit on K.
// Why it is fast: 12 rows x 32 outputs of sums stay in 24 registers; a step of 4 k reads two lines of weights and 12
// broadcast words for 24 vpdpbusd, so that neither port of loads is the limit. With few rows the sums are too few to
// hide the latency of vpdpbusd: several steps of k get sums of their own, and weights are read strictly in order.
#include <immintrin.h>

#include "../kernel.h"

namespace {

using qnb::GemmS8S8Args;

constexpr int64_t max_rows = 512;
constexpr int tile_rows = 12;

// How far ahead of its use a line of weights is asked for when one tile of rows is all there is.
constexpr int64_t prefetch_bytes = 4096;

__m512i as_u8(const int8_t* line) {
  return _mm512_xor_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(static_cast<char>(0x80)));
}

// Four neighbouring codes, k = 4 group and on, for each of sixteen outputs.
__m512i broadcast(const int8_t* a, int64_t group) {
  int32_t word;
  __builtin_memcpy(&word, a + group * 4, sizeof word);
  return _mm512_set1_epi32(word);
}

// -128 * sum over k of a[m,k].
int32_t row_term(const int8_t* a, int64_t k_blocks) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t block = 0; block < k_blocks; ++block) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(a + block * qnb::block_k));
  }
  return static_cast<int32_t>(uint32_t{0} - 128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)));
}

// What a tile of rows asks for while it computes. The only tile of a panel asks for the weights that it will need soon;
// the first of several asks for the next panel's, into the second cache; the others ask for nothing.
enum class Ahead { own, next_panel, nothing };

// Rows x 32 outputs of sums; `Phases` neighbouring steps of 4 k each add to sums of their own.
template <int Rows, int Phases, Ahead ahead>
void multiply(const GemmS8S8Args& args, const int8_t* a, const int32_t* row_terms, const int8_t* b, int32_t* acc) {
  const int64_t lda = args.lda, ld_acc = args.ld_acc;
  [[maybe_unused]] const int64_t panel_stride = args.panel_stride;
  __m512i sum[Phases][Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i term = _mm512_set1_epi32(row_terms[r]);
      sum[0][r][half] =
          args.accumulate ? _mm512_add_epi32(term, _mm512_loadu_si512(acc + r * ld_acc + half * 16)) : term;
#pragma GCC unroll 4
      for (int phase = 1; phase < Phases; ++phase) sum[phase][r][half] = _mm512_setzero_si512();
    }
  }
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    if constexpr (ahead == Ahead::own) {
      // One half after the other: weights read strictly front to back come twice as fast as two streams 1 KiB apart.
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        for (int group = 0; group < 16; group += Phases) {
#pragma GCC unroll 4
          for (int phase = 0; phase < Phases; ++phase) {
            const int8_t* line = b + half * qnb::half_bytes + (group + phase) * qnb::line_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(line + prefetch_bytes), _MM_HINT_T0);
            const __m512i w = as_u8(line);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) {
              sum[phase][r][half] = _mm512_dpbusd_epi32(sum[phase][r][half], w, broadcast(a + r * lda, group + phase));
            }
          }
        }
      }
    } else {
      for (int group = 0; group < 16; group += Phases) {
#pragma GCC unroll 4
        for (int phase = 0; phase < Phases; ++phase) {
          const int8_t* line = b + (group + phase) * qnb::line_bytes;
          if constexpr (ahead == Ahead::next_panel) {
            const int8_t* next = b + panel_stride + 2 * (group + phase) * qnb::line_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(next + qnb::line_bytes), _MM_HINT_T1);
          }
          const __m512i w0 = as_u8(line), w1 = as_u8(line + qnb::half_bytes);
#pragma GCC unroll 12
          for (int r = 0; r < Rows; ++r) {
            const __m512i codes = broadcast(a + r * lda, group + phase);
            sum[phase][r][0] = _mm512_dpbusd_epi32(sum[phase][r][0], w0, codes);
            sum[phase][r][1] = _mm512_dpbusd_epi32(sum[phase][r][1], w1, codes);
          }
        }
      }
    }
    a += qnb::block_k;
    b += qnb::block_bytes;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i all = sum[0][r][half];
#pragma GCC unroll 4
      for (int phase = 1; phase < Phases; ++phase) all = _mm512_add_epi32(all, sum[phase][r][half]);
      _mm512_storeu_si512(acc + r * ld_acc + half * 16, all);
    }
  }
}

using Multiply = void(const GemmS8S8Args&, const int8_t*, const int32_t*, const int8_t*, int32_t*);

// By number of rows.
template <Ahead ahead>
constexpr Multiply* multiply_rows[tile_rows + 1] = {
    nullptr,
    multiply<1, 4, ahead>,
    multiply<2, 4, ahead>,
    multiply<3, 2, ahead>,
    multiply<4, 2, ahead>,
    multiply<5, 2, ahead>,
    multiply<6, 2, ahead>,
    multiply<7, 1, ahead>,
    multiply<8, 1, ahead>,
    multiply<9, 1, ahead>,
    multiply<10, 1, ahead>,
    multiply<11, 1, ahead>,
    multiply<12, 1, ahead>,
};

void gemm(const GemmS8S8Args& args) {
  int32_t row_terms[max_rows];
  for (int64_t m = 0; m < args.rows; ++m) row_terms[m] = row_term(args.a + m * args.lda, args.k_blocks);

  // Tiles of nearly equal height: a last one of a row or two would wait for latency.
  const int64_t tiles = (args.rows + tile_rows - 1) / tile_rows;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int8_t* b = args.b + panel * args.panel_stride;
    int32_t* acc = args.acc + panel * qnb::panel_outputs;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = args.rows * tile / tiles, end = args.rows * (tile + 1) / tiles;
      const auto* choice = tiles == 1  ? multiply_rows<Ahead::own>
                           : tile == 0 ? multiply_rows<Ahead::next_panel>
                                       : multiply_rows<Ahead::nothing>;
      choice[end - m](args, args.a + m * args.lda, row_terms + m, b, acc + m * args.ld_acc);
    }
  }
}

}  // namespace

QNB_KERNEL(gemm_s8s8_avx512vnni) = {
    .op = qnb::Op::gemm_s8s8, .cuts = {.rows = 256, .panels = 8, .k_blocks = 16}, .gemm_s8s8 = gemm};

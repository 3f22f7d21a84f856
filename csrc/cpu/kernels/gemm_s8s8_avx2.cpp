// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], for all m < rows, n < 32 * panels, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmS8S8, and rows <= max_rows.
// vpmaddubsw would saturate, so codes and weights are widened to s16 and multiplied by vpmaddwd, whose two products and
// their sum always fit s32: exact for every code and weight. Sums of sums are modulo 2^32; the result fits, by the
// limit on K.
// Why it is fast: sixteen neighbouring bytes of the packed weight are 4 outputs x 4 k. Widened (one instruction from
// memory) they meet four neighbouring codes, broadcast as one, and no byte is shuffled: a lane sums two k of an output.
// One or two rows wait for memory alone: weights are widened in registers, read strictly front to back. With more, a
// piece of 16 outputs x 512 k is widened once, into 16 KiB that stay in the first cache while all rows pass by, six
// rows x 8 outputs at a time: 12 registers of sums, for which a step of 4 k reads two of weights and six of codes.
#include <immintrin.h>

#include "../kernel.h"

namespace {

using qnb::GemmS8S8Args;

constexpr int64_t max_rows = 64;
constexpr int tile_rows = 6;
constexpr int64_t piece_blocks = 8;
constexpr int64_t piece_k = piece_blocks * qnb::block_k;

// How far ahead of its use a line of weights is asked for while few rows make the product wait for memory.
constexpr int64_t prefetch_bytes = 4096;

// Sixteen bytes as s16.
__m256i widen(const int8_t* bytes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Four neighbouring codes as s16, four times over.
__m256i broadcast4(const int8_t* a) {
  int32_t word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm256_cvtepi8_epi16(_mm_set1_epi32(word));
}
__m256i broadcast4(const int16_t* a) {
  int64_t word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm256_set1_epi64x(word);
}

// Keeps the compiler from beginning all rows at once: their products would drive the sums out of the registers.
void finish_before_next(__m256i& a, __m256i& b) { __asm__ volatile("" : "+x"(a), "+x"(b)); }

// Adds the eight outputs of two registers of sums, whose lanes hold half an output each, to acc or puts them there.
void deliver(__m256i low, __m256i high, bool accumulate, int32_t* acc) {
  // Adding neighbours works on each half of a register alone; pairs of outputs then go to their places.
  __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8);
  __m256i* to = reinterpret_cast<__m256i*>(acc);
  if (accumulate) sum = _mm256_add_epi32(sum, _mm256_loadu_si256(to));
  _mm256_storeu_si256(to, sum);
}

// All of a panel's k at once for the few rows there are, the weights widened in registers.
template <int Rows>
void from_bytes(const GemmS8S8Args& args, const int8_t* b, int32_t* acc) {
  __m256i sum[2][Rows][4] = {};
  const int8_t* a = args.a;
  for (int64_t block = 0; block < args.k_blocks; ++block) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      for (int64_t group = 0; group < 16; ++group) {
        _mm_prefetch(reinterpret_cast<const char*>(b + prefetch_bytes), _MM_HINT_T0);
        __m256i codes[Rows];
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) codes[r] = broadcast4(a + r * args.lda + group * 4);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const __m256i w = widen(b + q * 16);
#pragma GCC unroll 2
          for (int r = 0; r < Rows; ++r) {
            sum[half][r][q] = _mm256_add_epi32(sum[half][r][q], _mm256_madd_epi16(codes[r], w));
          }
        }
        b += qnb::line_bytes;
      }
    }
    a += qnb::block_k;
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      int32_t* to = acc + r * args.ld_acc + half * 16;
      deliver(sum[half][r][0], sum[half][r][1], args.accumulate, to);
      deliver(sum[half][r][2], sum[half][r][3], args.accumulate, to + 8);
    }
  }
}

// Rows x 16 outputs over a widened piece: rows of codes lie piece_k apart, groups of weights 64.
template <int Rows>
void from_piece(const int16_t* codes, const int16_t* piece, int64_t groups, bool accumulate, int32_t* acc,
                int64_t ld_acc) {
  for (int eight = 0; eight < 2; ++eight) {
    __m256i sum[Rows][2] = {};
    const int16_t* a = codes;
    const __m256i* w = reinterpret_cast<const __m256i*>(piece) + eight * 2;
    for (int64_t group = 0; group < groups; ++group) {
      const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m256i x = broadcast4(a + r * piece_k);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(x, w0));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(x, w1));
        finish_before_next(sum[r][0], sum[r][1]);
      }
      a += 4;
      w += 4;
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) deliver(sum[r][0], sum[r][1], accumulate, acc + r * ld_acc + eight * 8);
  }
}

using FromPiece = void(const int16_t*, const int16_t*, int64_t, bool, int32_t*, int64_t);

// By number of rows.
constexpr FromPiece* from_piece_rows[tile_rows + 1] = {nullptr,       from_piece<1>, from_piece<2>, from_piece<3>,
                                                       from_piece<4>, from_piece<5>, from_piece<6>};

void many_rows(const GemmS8S8Args& args) {
  alignas(64) int16_t codes[max_rows * piece_k];
  alignas(64) int16_t piece[16 * piece_k];
  // Tiles of nearly equal height: a last one of a row or two would read more than it computes.
  const int64_t tiles = (args.rows + tile_rows - 1) / tile_rows;
  for (int64_t block = 0; block < args.k_blocks; block += piece_blocks) {
    const int64_t left = args.k_blocks - block, blocks = left < piece_blocks ? left : piece_blocks;
    for (int64_t m = 0; m < args.rows; ++m) {
      const int8_t* from = args.a + m * args.lda + block * qnb::block_k;
      for (int64_t k = 0; k < blocks * qnb::block_k; k += 16) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes + m * piece_k + k), widen(from + k));
      }
    }
    for (int64_t panel = 0; panel < args.panels; ++panel) {
      for (int64_t half = 0; half < 2; ++half) {
        const int8_t* from = args.b + panel * args.panel_stride + block * qnb::block_bytes + half * qnb::half_bytes;
        // The next piece is asked for while this one is widened, so that it arrives while this one is multiplied.
        const int64_t next = half == 0 ? qnb::half_bytes : args.panel_stride - qnb::half_bytes;
        int16_t* to = piece;
        for (int64_t i = 0; i < blocks; ++i) {
          for (int64_t line = 0; line < qnb::half_bytes; line += qnb::line_bytes) {
            _mm_prefetch(reinterpret_cast<const char*>(from + line + next), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int64_t byte = line; byte < line + qnb::line_bytes; byte += 16) {
              _mm256_store_si256(reinterpret_cast<__m256i*>(to + byte), widen(from + byte));
            }
          }
          from += qnb::block_bytes;
          to += qnb::half_bytes;
        }
        int32_t* acc = args.acc + panel * qnb::panel_outputs + half * 16;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t m = args.rows * tile / tiles, end = args.rows * (tile + 1) / tiles;
          from_piece_rows[end - m](codes + m * piece_k, piece, blocks * 16, args.accumulate || block > 0,
                                   acc + m * args.ld_acc, args.ld_acc);
        }
      }
    }
  }
}

void gemm(const GemmS8S8Args& args) {
  if (args.rows > 2) return many_rows(args);
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int8_t* b = args.b + panel * args.panel_stride;
    int32_t* acc = args.acc + panel * qnb::panel_outputs;
    if (args.rows == 1) {
      from_bytes<1>(args, b, acc);
    } else {
      from_bytes<2>(args, b, acc);
    }
  }
}

}  // namespace

QNB_KERNEL(gemm_s8s8_avx2) = {.op = qnb::Op::gemm_s8s8,
                              .cuts = {.rows = max_rows, .panels = 8, .k_blocks = piece_blocks},
                              .gemm_s8s8 = gemm};

// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], for all m < rows, n < 32 * panels, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmS8S8, and rows <= max_rows.
// The arithmetic is that of gemm_s8s8_avx512vnni.cpp: vpdpbusd multiplies u8 by s8, weights are made u8 by flipping
// their top bit, and
//   sum a * w = sum a * (w + 128) - 128 * sum a
// takes that away again. All of it modulo 2^32, where vpdpbusd is exact; the result fits, by the limit on K.
// Why it is fast: 6 rows x 16 outputs of sums stay in 12 of the 16 registers; a step of 4 k reads one line of weights
// and six broadcast words for 12 vpdpbusd. A tile of rows passes both halves of a panel before the next one does, while
// its codes lie in the first cache. With few rows the sums are too few to hide the latency of vpdpbusd: several steps
// of k get sums of their own. One tile alone sums both halves in one pass over k, so that weights are read strictly in
// order.
#include <immintrin.h>

#include "../kernel.h"

namespace {

using qnb::GemmS8S8Args;

constexpr int64_t max_rows = 256;
constexpr int tile_rows = 6;

// How far ahead of its use a line of weights is asked for when one tile of rows is all there is.
constexpr int64_t prefetch_bytes = 4096;

__m256i load(const int8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
__m256i load(const int32_t* sums) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)); }
void store(int32_t* sums, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), v); }

__m256i as_u8(const int8_t* bytes) { return _mm256_xor_si256(load(bytes), _mm256_set1_epi8(static_cast<char>(0x80))); }

// Four neighbouring codes, k = 4 group and on, for each of eight outputs.
__m256i broadcast(const int8_t* a, int64_t group) {
  int32_t word;
  __builtin_memcpy(&word, a + group * 4, sizeof word);
  return _mm256_set1_epi32(word);
}

// -128 * sum over k of a[m,k].
int32_t row_term(const int8_t* a, int64_t k_blocks) {
  __m256i sum = _mm256_setzero_si256();
  for (int64_t k = 0; k < k_blocks * qnb::block_k; k += 32) {
    sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), load(a + k));
  }
  alignas(32) uint32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
  uint32_t all = 0;
  for (const uint32_t part : lane) all += part;
  return static_cast<int32_t>(uint32_t{0} - 128u * all);
}

// Adds the products of 64 k, Rows x 16 outputs, to the sums; neighbouring steps of 4 k add to sums of their own.
template <int Rows, int Phases, bool Prefetch>
void add_products(__m256i (&sum)[Phases][Rows][2], const int8_t* a, int64_t lda, const int8_t* b) {
  for (int64_t group = 0; group < 16; group += Phases) {
#pragma GCC unroll 4
    for (int phase = 0; phase < Phases; ++phase) {
      const int8_t* line = b + (group + phase) * qnb::line_bytes;
      if constexpr (Prefetch) _mm_prefetch(reinterpret_cast<const char*>(line + prefetch_bytes), _MM_HINT_T0);
      const __m256i w0 = as_u8(line), w1 = as_u8(line + 32);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m256i codes = broadcast(a + r * lda, group + phase);
        sum[phase][r][0] = _mm256_dpbusd_avx_epi32(sum[phase][r][0], w0, codes);
        sum[phase][r][1] = _mm256_dpbusd_avx_epi32(sum[phase][r][1], w1, codes);
      }
    }
  }
}

template <int Rows, int Phases>
void begin(__m256i (&sum)[Phases][Rows][2], const GemmS8S8Args& args, const int32_t* row_terms, const int32_t* acc) {
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    const __m256i term = _mm256_set1_epi32(row_terms[r]);
#pragma GCC unroll 2
    for (int eight = 0; eight < 2; ++eight) {
      sum[0][r][eight] = args.accumulate ? _mm256_add_epi32(term, load(acc + r * args.ld_acc + eight * 8)) : term;
#pragma GCC unroll 4
      for (int phase = 1; phase < Phases; ++phase) sum[phase][r][eight] = _mm256_setzero_si256();
    }
  }
}

template <int Rows, int Phases>
void end(const __m256i (&sum)[Phases][Rows][2], int32_t* acc, int64_t ld_acc) {
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int eight = 0; eight < 2; ++eight) {
      __m256i all = sum[0][r][eight];
#pragma GCC unroll 4
      for (int phase = 1; phase < Phases; ++phase) all = _mm256_add_epi32(all, sum[phase][r][eight]);
      store(acc + r * ld_acc + eight * 8, all);
    }
  }
}

// Rows x 32 outputs, one half of the panel after the other, or (Alone) both in one pass.
template <int Rows, int Phases, bool Alone>
void multiply(const GemmS8S8Args& args, const int8_t* a, const int32_t* row_terms, const int8_t* b, int32_t* acc) {
  if constexpr (Alone) {
    // Sums that do not fit the registers wait in the first cache while the other half's kilobyte passes by.
    __m256i left[Phases][Rows][2], right[Phases][Rows][2];
    begin(left, args, row_terms, acc);
    begin(right, args, row_terms, acc + 16);
    for (int64_t block = 0; block < args.k_blocks; ++block) {
      const int8_t* codes = a + block * qnb::block_k;
      add_products<Rows, Phases, true>(left, codes, args.lda, b + block * qnb::block_bytes);
      add_products<Rows, Phases, true>(right, codes, args.lda, b + block * qnb::block_bytes + qnb::half_bytes);
    }
    end(left, acc, args.ld_acc);
    end(right, acc + 16, args.ld_acc);
  } else {
    for (int half = 0; half < 2; ++half) {
      __m256i sum[Phases][Rows][2];
      begin(sum, args, row_terms, acc + half * 16);
      for (int64_t block = 0; block < args.k_blocks; ++block) {
        add_products<Rows, Phases, false>(sum, a + block * qnb::block_k, args.lda,
                                          b + block * qnb::block_bytes + half * qnb::half_bytes);
      }
      end(sum, acc + half * 16, args.ld_acc);
    }
  }
}

using Multiply = void(const GemmS8S8Args&, const int8_t*, const int32_t*, const int8_t*, int32_t*);

// By number of rows.
template <bool Alone>
constexpr Multiply* multiply_rows[tile_rows + 1] = {
    nullptr,
    multiply<1, 2, Alone>,
    multiply<2, 2, Alone>,
    multiply<3, 2, Alone>,
    multiply<4, 1, Alone>,
    multiply<5, 1, Alone>,
    multiply<6, 1, Alone>,
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
      const int64_t m = args.rows * tile / tiles, next = args.rows * (tile + 1) / tiles;
      const auto* choice = tiles == 1 ? multiply_rows<true> : multiply_rows<false>;
      choice[next - m](args, args.a + m * args.lda, row_terms + m, b, acc + m * args.ld_acc);
    }
  }
}

}  // namespace

QNB_KERNEL(gemm_s8s8_avxvnni) = {
    .op = qnb::Op::gemm_s8s8, .cuts = {.rows = max_rows, .panels = 8, .k_blocks = 8}, .gemm_s8s8 = gemm};

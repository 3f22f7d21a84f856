// acc[m,n] = sum over k of a[m,k] * w[n,k] in f32,  w[n,k] = (value of code[n,k] - zero[n,g]) * scale[n,g],
// for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32Codes, and rows <= max_rows.
// gemm_f32_avx512.h says in which order the sum is taken. It is the same on both paths below, and so does not depend on
// the number of rows.
// Why it is fast: sixteen neighbouring bytes, widened once to 32 bits, hold sixteen codes for each of several places of
// the block. A shift brings a place down, and vpermps looks sixteen values up in a register, ignoring the bits above.
// e4m3, whose values are bf16 too, is looked up in four registers of 32 half words, for two places at a time, one in
// each half word. Scales are brought into the lanes' order for four groups at once: a register of four outputs x four
// groups becomes, by one shuffle within its quarters, the scales of any of the four. One or two rows wait for memory
// alone: weights stay in registers, both halves of a panel in one pass. With more rows a piece is decoded once for all.
#include "gemm_f32_avx512.h"

namespace {

using qnb::GemmF32CodesArgs;

// How far ahead of its use a line of codes is asked for while few rows make the product wait for memory.
constexpr int64_t prefetch_bytes = 4096;

// A quad is 4 lines, 16 outputs x 16 k. Four quads are a half, sixteen neighbouring places of a line a quarter.
constexpr int64_t quad_bytes = 4 * qnb::line_bytes;

// How codes become values; the first three are the number of bits.
enum class Format { two = 2, three = 3, four = 4, integer, table, e4m3 };

constexpr int64_t block_bytes_of(Format format) {
  return qnb::codes_block_bytes(format <= Format::four ? static_cast<int64_t>(format) : 8);
}

__m512i load_bytes(const uint8_t* bytes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

template <int Bits>
__m512i shift_down(__m512i v) {
  if constexpr (Bits == 0) return v;
  return _mm512_srli_epi32(v, Bits);
}

struct Values {
  __m512 sixteen;       // below 8 bits
  const float* table;   // of 8
  __m512i e4m3[4];      // as bf16, those without a sign
};

template <Format format>
Values values_of(const GemmF32CodesArgs& args) {
  Values v = {};
  v.table = args.codes.values;
  if constexpr (format <= Format::four) v.sixteen = _mm512_loadu_ps(v.table);
  if constexpr (format == Format::e4m3) {
    for (int i = 0; i < 4; ++i) {
      const auto halves = [&](int first) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(v.table + 32 * i + first), 16));
      };
      v.e4m3[i] = _mm512_inserti64x4(_mm512_castsi256_si512(halves(0)), halves(16), 1);
    }
  }
  return v;
}

// Of sixteen places in each half: 4 outputs x 4 k.
struct Pair {
  __m512 left, right;
};

// What the four lines of a quad share: at 3 bits, all eight codes of a place.
template <Format format>
__m512i word_of(const uint8_t* quad) {
  if constexpr (format != Format::three) return _mm512_undefined_epi32();
  const __m512i low = load_bytes(quad), middle = _mm512_slli_epi32(load_bytes(quad + qnb::line_bytes), 8);
  const __m512i high = _mm512_slli_epi32(load_bytes(quad + 2 * qnb::line_bytes), 16);
  return _mm512_ternarylogic_epi32(low, middle, high, 0xFE);
}

// The bytes of a block from which the codes of a quad come.
template <Format format>
const uint8_t* quad_of(const uint8_t* block, int quad) {
  if constexpr (format == Format::two) return block + quad % 2 * quad_bytes;
  if constexpr (format == Format::three) return block + quad * 3 * qnb::line_bytes;
  return block + quad * quad_bytes;
}

// The values of the codes at a quarter of line `line`; `at` points to where quad_of said, behind it by the quarter.
template <Format format, int quad, int line>
Pair look_up(const uint8_t* at, __m512i word, const Values& values) {
  if constexpr (format <= Format::four) {
    // At 4 bits a byte holds the codes of both halves, at 2 those of two quads of both halves.
    constexpr int left = format == Format::four ? 0 : format == Format::two ? 2 * (quad / 2) : 3 * line;
    constexpr int right = left + (format == Format::three ? 12 : 4);
    const __m512i codes = format == Format::three ? word : load_bytes(at + line * qnb::line_bytes);
    return {_mm512_permutexvar_ps(shift_down<left>(codes), values.sixteen),
            _mm512_permutexvar_ps(shift_down<right>(codes), values.sixteen)};
  } else {
    const __m512i left = load_bytes(at + line * qnb::line_bytes);
    const __m512i right = load_bytes(at + line * qnb::line_bytes + qnb::half_bytes);
    if constexpr (format == Format::integer) {
      const __m512i middle = _mm512_set1_epi32(128);
      return {_mm512_cvtepi32_ps(_mm512_sub_epi32(left, middle)), _mm512_cvtepi32_ps(_mm512_sub_epi32(right, middle))};
    }
    if constexpr (format == Format::table) {
      return {_mm512_i32gather_ps(left, values.table, 4), _mm512_i32gather_ps(right, values.table, 4)};
    }
    const __m512i both = _mm512_or_si512(left, _mm512_slli_epi32(right, 16));
    const __m512i below_64 = _mm512_permutex2var_epi16(values.e4m3[0], both, values.e4m3[1]);
    const __m512i above = _mm512_permutex2var_epi16(values.e4m3[2], both, values.e4m3[3]);
    const __mmask32 is_above = _mm512_test_epi16_mask(both, _mm512_set1_epi16(64));
    const __m512i absolute = _mm512_mask_mov_epi16(below_64, is_above, above);
    // The sign, bit 7 of the code, becomes bit 15: absolute | (sign & 0x8000).
    const __m512i bf16 = _mm512_ternarylogic_epi32(absolute, _mm512_slli_epi32(both, 8),
                                                   _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0xF8);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bf16, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))))};
  }
}

// Numbers of a group each, f32 (outputs, groups), as 8 registers of 4 outputs x 4 equal lanes for each of 4 groups.
class Spread {
 public:
  Spread(const float* rows, int64_t outputs, int64_t groups) : rows_(rows), outputs_(outputs), groups_(groups) {}

  // 128 numbers: [half][quarter][output of the quarter][4 times].
  const float* of(int64_t group) {
    if (group / 4 != four_) fill(four_ = group / 4);
    return numbers_[group % 4];
  }

 private:
  void fill(int64_t four) {
    const int64_t first = four * 4;
    if (outputs_ < qnb::panel_outputs || first + 4 > groups_) return fill_what_there_is(first);
    for (int64_t quarter = 0; quarter < 8; ++quarter) {
      const float* from = rows_ + quarter * 4 * groups_ + first;
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from));
      v = _mm512_insertf32x4(v, _mm_loadu_ps(from + groups_), 1);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 2 * groups_), 2);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 3 * groups_), 3);
      _mm512_store_ps(numbers_[0] + quarter * 16, _mm512_permute_ps(v, 0x00));
      _mm512_store_ps(numbers_[1] + quarter * 16, _mm512_permute_ps(v, 0x55));
      _mm512_store_ps(numbers_[2] + quarter * 16, _mm512_permute_ps(v, 0xAA));
      _mm512_store_ps(numbers_[3] + quarter * 16, _mm512_permute_ps(v, 0xFF));
    }
  }

  void fill_what_there_is(int64_t first) {
    for (int64_t g = 0; g < 4 && first + g < groups_; ++g) {
      for (int64_t n = 0; n < qnb::panel_outputs; ++n) {
        const float number = n < outputs_ ? rows_[n * groups_ + first + g] : 0.0f;
        _mm_store_ps(numbers_[g] + n * 4, _mm_set1_ps(number));
      }
    }
  }

  const float* rows_;
  int64_t outputs_, groups_, four_ = -1;
  alignas(64) float numbers_[4][128];
};

// The numbers that go with each 32 k of a panel, in the order of k.
template <bool Asymmetric>
struct Grid {
  Spread scales, zeros;
  int64_t group, last, index = 0, end;  // the group at hand, and the first k behind it

  explicit Grid(const GemmF32CodesArgs& args)
      : scales(args.scale, args.outputs, args.groups),
        zeros(args.zero, args.outputs, args.groups),
        group(args.group),
        last(args.groups - 1),
        end(args.group) {}

  // Asks for the part of the next panel's numbers that falls to a block, so that a panel's do not all come late.
  void prefetch(const GemmF32CodesArgs& args, int64_t block) const {
    const int64_t numbers = qnb::panel_outputs * args.groups, each = numbers / args.k_blocks;
    for (int64_t i = block * each; i < (block + 1) * each; i += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(args.scale + numbers + i), _MM_HINT_T0);
      if constexpr (Asymmetric) _mm_prefetch(reinterpret_cast<const char*>(args.zero + numbers + i), _MM_HINT_T0);
    }
  }

  void move_to(int64_t k) {
    if (k < end || index == last) return;
    ++index;
    end += group;
  }
  const float* scale() { return scales.of(index); }
  const float* zero() { return Asymmetric ? zeros.of(index) : nullptr; }
};

// The numbers of a quarter of both halves: a group's scales, or its zeros.
Pair quarter_of(const float* numbers, int q) {
  return {_mm512_load_ps(numbers + q * 16), _mm512_load_ps(numbers + 64 + q * 16)};
}

// Calls use(line, quarter, weights) for the places of a quad, in the order of the lines for each quarter.
template <Format format, bool Asymmetric, int quad, class Use>
__attribute__((always_inline)) inline void for_quad(const uint8_t* block, const Values& values, const float* scale,
                                                    const float* zero, const Use& use) {
  const uint8_t* bytes = quad_of<format>(block, quad);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const uint8_t* at = bytes + q * 16;
    const Pair s = quarter_of(scale, q);
    const __m512i word = word_of<format>(at);
    const auto put = [&](int line, Pair v) __attribute__((always_inline)) {
      if constexpr (Asymmetric) {
        const Pair z = quarter_of(zero, q);
        v = {_mm512_sub_ps(v.left, z.left), _mm512_sub_ps(v.right, z.right)};
      }
      use(line, q, Pair{_mm512_mul_ps(v.left, s.left), _mm512_mul_ps(v.right, s.right)});
    };
    put(0, look_up<format, quad, 0>(at, word, values));
    put(1, look_up<format, quad, 1>(at, word, values));
    put(2, look_up<format, quad, 2>(at, word, values));
    put(3, look_up<format, quad, 3>(at, word, values));
  }
}

// 16 k of both halves, for few rows.
template <Format format, bool Asymmetric, int quad, int Rows>
__attribute__((always_inline)) inline void add_quad(__m512 (&sum)[2][Rows][4], const float* a, int64_t lda,
                                                    const uint8_t* block, const Values& values, const float* scale,
                                                    const float* zero) {
  constexpr int64_t share = block_bytes_of(format) / 4;
#pragma GCC unroll 8
  for (int64_t byte = quad * share; byte < (quad + 1) * share; byte += qnb::line_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(block + byte + prefetch_bytes), _MM_HINT_T0);
  }
  __m512 x[Rows][4];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) x[r][line] = broadcast4(a + r * lda + quad * 16 + line * 4);
  }
  for_quad<format, Asymmetric, quad>(block, values, scale, zero,
                                     [&](int line, int q, Pair w) __attribute__((always_inline)) {
#pragma GCC unroll 2
                                       for (int r = 0; r < Rows; ++r) {
                                         sum[0][r][q] = _mm512_fmadd_ps(x[r][line], w.left, sum[0][r][q]);
                                         sum[1][r][q] = _mm512_fmadd_ps(x[r][line], w.right, sum[1][r][q]);
                                       }
                                     });
}

template <Format format, bool Asymmetric, int Rows>
void few_rows(const GemmF32CodesArgs& args) {
  constexpr int64_t bytes = block_bytes_of(format);
  const Values values = values_of<format>(args);
  Grid<Asymmetric> grid(args);
  __m512 sum[2][Rows][4] = {};
  const float* a = args.a;
  const uint8_t* block = args.b;
  for (int64_t i = 0; i < args.k_blocks; ++i) {
    const int64_t k = i * qnb::block_k;
    grid.prefetch(args, i);
    grid.move_to(k);
    const float *scale = grid.scale(), *zero = grid.zero();
    add_quad<format, Asymmetric, 0, Rows>(sum, a, args.lda, block, values, scale, zero);
    add_quad<format, Asymmetric, 1, Rows>(sum, a, args.lda, block, values, scale, zero);
    grid.move_to(k + 32);
    scale = grid.scale(), zero = grid.zero();
    add_quad<format, Asymmetric, 2, Rows>(sum, a, args.lda, block, values, scale, zero);
    add_quad<format, Asymmetric, 3, Rows>(sum, a, args.lda, block, values, scale, zero);
    a += qnb::block_k;
    block += bytes;
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) _mm512_storeu_ps(args.acc + r * args.ld_acc + h * 16, fold(sum[h][r]));
  }
}

// 16 k of both halves to f32.
template <Format format, bool Asymmetric, int quad>
__attribute__((always_inline)) inline void decode_quad(float* left, float* right, const uint8_t* block,
                                                       const Values& values, const float* scale, const float* zero) {
  for_quad<format, Asymmetric, quad>(block, values, scale, zero,
                                     [&](int line, int q, Pair w) __attribute__((always_inline)) {
                                       const int64_t to = quad * quad_bytes + line * 64 + q * 16;
                                       _mm512_store_ps(left + to, w.left);
                                       _mm512_store_ps(right + to, w.right);
                                     });
}

template <Format format, bool Asymmetric>
void many_rows(const GemmF32CodesArgs& args) {
  constexpr int64_t bytes = block_bytes_of(format);
  const Values values = values_of<format>(args);
  Grid<Asymmetric> grid(args);
  multiply_pieces(args.a, args.lda, args.rows, args.k_blocks, args.acc, args.ld_acc,
                  [&](int64_t first, int64_t blocks, float (&piece)[2][piece_floats]) {
                    for (int64_t i = 0; i < blocks; ++i) {
                      const uint8_t* block = args.b + (first + i) * bytes;
                      float *left = piece[0] + i * qnb::half_bytes, *right = piece[1] + i * qnb::half_bytes;
                      grid.move_to((first + i) * qnb::block_k);
                      const float *scale = grid.scale(), *zero = grid.zero();
                      decode_quad<format, Asymmetric, 0>(left, right, block, values, scale, zero);
                      decode_quad<format, Asymmetric, 1>(left, right, block, values, scale, zero);
                      grid.move_to((first + i) * qnb::block_k + 32);
                      scale = grid.scale(), zero = grid.zero();
                      decode_quad<format, Asymmetric, 2>(left, right, block, values, scale, zero);
                      decode_quad<format, Asymmetric, 3>(left, right, block, values, scale, zero);
                    }
                  });
}

template <Format format, bool Asymmetric>
void by_rows(const GemmF32CodesArgs& args) {
  if (args.rows == 1) return few_rows<format, Asymmetric, 1>(args);
  if (args.rows == 2) return few_rows<format, Asymmetric, 2>(args);
  many_rows<format, Asymmetric>(args);
}

template <Format format>
void by_zero(const GemmF32CodesArgs& args) {
  if (args.zero == nullptr) return by_rows<format, false>(args);
  by_rows<format, true>(args);
}

void gemm(const GemmF32CodesArgs& args) {
  if (args.k_blocks == 0) return set_zero(args.acc, args.rows, args.ld_acc);
  switch (args.codes.bits) {
    case 2:
      return by_zero<Format::two>(args);
    case 3:
      return by_zero<Format::three>(args);
    case 4:
      return by_zero<Format::four>(args);
    default:
      if (args.codes.values == nullptr) return by_zero<Format::integer>(args);
      if (args.codes.e4m3) return by_zero<Format::e4m3>(args);
      return by_zero<Format::table>(args);
  }
}

}  // namespace

QNB_KERNEL(gemm_f32codes_avx512) = {
    .op = qnb::Op::gemm_f32codes, .cuts = {.rows = max_rows}, .gemm_f32codes = gemm};

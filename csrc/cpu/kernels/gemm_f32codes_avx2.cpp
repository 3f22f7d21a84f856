// acc[m,n] = sum over k of a[m,k] * w[n,k] in f32,  w[n,k] = (value of code[n,k] - zero[n,g]) * scale[n,g],
// for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32Codes, and rows <= max_rows.
// gemm_f32_avx512.h says in which order the sum is taken. It is the same on both paths below, and so does not depend on
// the number of rows.
// Why it is fast: eight neighbouring bytes hold eight codes for each of several places of the block. Widened once to 32
// bits, a shift brings each place down, and vpermps looks eight values up in a register, ignoring the bits above; at 4
// bits the fourth chooses between two registers. One row's weights stay in registers, one half of a block after the
// other, as the sums of both do not fit. With more rows a piece is decoded once, into the first cache, for all of them.
#include "gemm_f32_avx2.h"

namespace {

using qnb::GemmF32CodesArgs;

// How far ahead of its use a line of codes is asked for.
constexpr int64_t prefetch_bytes = 2048;

// A quad is 4 lines, 16 outputs x 16 k. Four quads are a half.
constexpr int64_t quad_bytes = 4 * qnb::line_bytes;

// How codes become values; the first three are the number of bits.
enum class Format { two = 2, three = 3, four = 4, integer, table, e4m3 };

constexpr int64_t block_bytes_of(Format format) {
  return qnb::codes_block_bytes(format <= Format::four ? static_cast<int64_t>(format) : 8);
}

__m256i load_bytes(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

template <int Bits>
__m256i shift_down(__m256i v) {
  if constexpr (Bits == 0) return v;
  return _mm256_srli_epi32(v, Bits);
}

struct Values {
  __m256 low, high;    // below 8 bits
  const float* table;  // of 8
};

// What the four lines of a quad share: at 3 bits, all eight codes of a place.
template <Format format>
__m256i word_of(const uint8_t* quad) {
  if constexpr (format != Format::three) return _mm256_undefined_si256();
  const __m256i low = load_bytes(quad), middle = _mm256_slli_epi32(load_bytes(quad + qnb::line_bytes), 8);
  return _mm256_or_si256(_mm256_or_si256(low, middle),
                         _mm256_slli_epi32(load_bytes(quad + 2 * qnb::line_bytes), 16));
}

// The bytes of a block from which the codes of a quad come.
template <Format format>
const uint8_t* quad_of(const uint8_t* block, int quad) {
  if constexpr (format == Format::two) return block + quad % 2 * quad_bytes;
  if constexpr (format == Format::three) return block + quad * 3 * qnb::line_bytes;
  return block + quad * quad_bytes;
}

// The values of eight codes of line `line`, 2 outputs x 4 k; `at` points to where quad_of said, behind it by the eighth.
template <Format format, int quad, int line, int half>
__m256 look_up(const uint8_t* at, __m256i word, const Values& values) {
  if constexpr (format <= Format::four) {
    // At 4 bits a byte holds the codes of both halves, at 2 those of two quads of both halves.
    constexpr int place = format == Format::four  ? 4 * half
                          : format == Format::two ? 2 * (quad / 2) + 4 * half
                                                  : 3 * line + 12 * half;
    const __m256i code = shift_down<place>(format == Format::three ? word : load_bytes(at + line * qnb::line_bytes));
    const __m256 below_8 = _mm256_permutevar8x32_ps(values.low, code);
    if constexpr (format != Format::four) return below_8;
    return _mm256_blendv_ps(below_8, _mm256_permutevar8x32_ps(values.high, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  } else {
    const __m256i code = load_bytes(at + half * qnb::half_bytes + line * qnb::line_bytes);
    if constexpr (format == Format::integer) return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(128)));
    if constexpr (format == Format::table) return _mm256_i32gather_ps(values.table, code, 4);
    // e4m3 shifted up by 7 is an f16 that is 2^8 too small, denormals included. It knows no infinity and one NaN.
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7F));
    const __m256i sign = _mm256_slli_epi32(_mm256_sub_epi32(code, magnitude), 24);
    const __m256i shifted = _mm256_slli_epi32(magnitude, 7);
    const __m256 small =
        _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1)));
    const __m256 absolute =
        _mm256_blendv_ps(_mm256_mul_ps(small, _mm256_set1_ps(256.0f)),
                         _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)),
                         _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F))));
    return _mm256_or_ps(absolute, _mm256_castsi256_ps(sign));
  }
}

// Numbers of a group each, f32 (outputs, groups), four times over in the order of the lanes, one group at a time.
class Spread {
 public:
  Spread(const float* rows, int64_t outputs, int64_t groups) : rows_(rows), outputs_(outputs), groups_(groups) {}

  // 128 numbers: [half][output of the half][4 times].
  const float* of(int64_t group) {
    if (group != group_) fill(group_ = group);
    return numbers_;
  }

 private:
  void fill(int64_t group) {
    for (int64_t n = 0; n < qnb::panel_outputs; ++n) {
      const float number = n < outputs_ ? rows_[n * groups_ + group] : 0.0f;
      _mm_store_ps(numbers_ + n * 4, _mm_set1_ps(number));
    }
  }

  const float* rows_;
  int64_t outputs_, groups_, group_ = -1;
  alignas(32) float numbers_[128];
};

// The group of every 32 k, in the order of k.
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

  void move_to(int64_t k) {
    if (k < end || index == last) return;
    ++index;
    end += group;
  }
  const float* scale() { return scales.of(index); }
  const float* zero() { return Asymmetric ? zeros.of(index) : nullptr; }
};

template <Format format>
Values values_of(const GemmF32CodesArgs& args) {
  const float* table = args.codes.values;
  if constexpr (format > Format::four) return {_mm256_setzero_ps(), _mm256_setzero_ps(), table};
  return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8), table};
}

// Asks for the quarter of a block that lies ahead of a quad.
template <Format format, int quad>
void prefetch_quad(const uint8_t* block) {
  constexpr int64_t share = block_bytes_of(format) / 4;
  for (int64_t byte = quad * share; byte < (quad + 1) * share; byte += qnb::line_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(block + byte + prefetch_bytes), _MM_HINT_T0);
  }
}

// Calls use(line, eighth, weights) for the places of a quad in one half, in the order of the lines for each eighth: 2
// outputs x 4 k.
template <Format format, bool Asymmetric, int half, int quad, class Use>
__attribute__((always_inline)) inline void for_quad(const uint8_t* block, const Values& values, const float* scale,
                                                    const float* zero, const Use& use) {
  const uint8_t* bytes = quad_of<format>(block, quad);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* at = bytes + i * 8;
    const __m256i word = word_of<format>(at);
    const __m256 s = _mm256_load_ps(scale + half * 64 + i * 8);
    const auto put = [&](int line, __m256 v) __attribute__((always_inline)) {
      if constexpr (Asymmetric) v = _mm256_sub_ps(v, _mm256_load_ps(zero + half * 64 + i * 8));
      use(line, i, _mm256_mul_ps(v, s));
    };
    put(0, look_up<format, quad, 0, half>(at, word, values));
    put(1, look_up<format, quad, 1, half>(at, word, values));
    put(2, look_up<format, quad, 2, half>(at, word, values));
    put(3, look_up<format, quad, 3, half>(at, word, values));
  }
}

template <Format format, bool Asymmetric, int half, int quad>
__attribute__((always_inline)) inline void add_quad(__m256 (&sum)[8], const float* a, const uint8_t* block,
                                                    const Values& values, const float* scale, const float* zero) {
  __m256 x[4];
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) x[line] = broadcast4(a + quad * 16 + line * 4);
  for_quad<format, Asymmetric, half, quad>(
      block, values, scale, zero,
      [&](int line, int i, __m256 w) __attribute__((always_inline)) { sum[i] = _mm256_fmadd_ps(x[line], w, sum[i]); });
}

// 32 k of one half, whose sums wait in `waiting`.
template <Format format, bool Asymmetric, int half, int quad>
void add_two_quads(__m256 (&waiting)[8], const float* a, const uint8_t* block, const Values& values,
                   const float* scale, const float* zero) {
  __m256 sum[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sum[i] = waiting[i];
  add_quad<format, Asymmetric, half, quad>(sum, a, block, values, scale, zero);
  add_quad<format, Asymmetric, half, quad + 1>(sum, a, block, values, scale, zero);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) waiting[i] = sum[i];
}

template <Format format, bool Asymmetric>
void one_row(const GemmF32CodesArgs& args) {
  constexpr int64_t bytes = block_bytes_of(format);
  const Values values = values_of<format>(args);
  Grid<Asymmetric> grid(args);
  __m256 sum[2][8] = {};
  for (int64_t i = 0; i < args.k_blocks; ++i) {
    const float* a = args.a + i * qnb::block_k;
    const uint8_t* block = args.b + i * bytes;
    prefetch_quad<format, 0>(block);
    prefetch_quad<format, 1>(block);
    grid.move_to(i * qnb::block_k);
    const float *scale = grid.scale(), *zero = grid.zero();
    add_two_quads<format, Asymmetric, 0, 0>(sum[0], a, block, values, scale, zero);
    add_two_quads<format, Asymmetric, 1, 0>(sum[1], a, block, values, scale, zero);
    prefetch_quad<format, 2>(block);
    prefetch_quad<format, 3>(block);
    grid.move_to(i * qnb::block_k + 32);
    scale = grid.scale(), zero = grid.zero();
    add_two_quads<format, Asymmetric, 0, 2>(sum[0], a, block, values, scale, zero);
    add_two_quads<format, Asymmetric, 1, 2>(sum[1], a, block, values, scale, zero);
  }
#pragma GCC unroll 4
  for (int eight = 0; eight < 4; ++eight) {
    const __m256* s = sum[eight / 2] + eight % 2 * 4;
    _mm256_storeu_ps(args.acc + eight * 8, fold(s[0], s[1], s[2], s[3]));
  }
}

// 16 k of both halves to f32.
template <Format format, bool Asymmetric, int quad>
__attribute__((always_inline)) inline void decode_quad(float (&piece)[2][piece_floats], int64_t at,
                                                       const uint8_t* block, const Values& values, const float* scale,
                                                       const float* zero) {
  const auto to = [&](float* half) __attribute__((always_inline)) {
    return [=](int line, int i, __m256 w) __attribute__((always_inline)) {
      _mm256_store_ps(half + at + quad * quad_bytes + line * 64 + i * 8, w);
    };
  };
  prefetch_quad<format, quad>(block);
  for_quad<format, Asymmetric, 0, quad>(block, values, scale, zero, to(piece[0]));
  for_quad<format, Asymmetric, 1, quad>(block, values, scale, zero, to(piece[1]));
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
                      const int64_t at = i * qnb::half_bytes;
                      grid.move_to((first + i) * qnb::block_k);
                      const float *scale = grid.scale(), *zero = grid.zero();
                      decode_quad<format, Asymmetric, 0>(piece, at, block, values, scale, zero);
                      decode_quad<format, Asymmetric, 1>(piece, at, block, values, scale, zero);
                      grid.move_to((first + i) * qnb::block_k + 32);
                      scale = grid.scale(), zero = grid.zero();
                      decode_quad<format, Asymmetric, 2>(piece, at, block, values, scale, zero);
                      decode_quad<format, Asymmetric, 3>(piece, at, block, values, scale, zero);
                    }
                  });
}

template <Format format, bool Asymmetric>
void by_rows(const GemmF32CodesArgs& args) {
  if (args.rows == 1) return one_row<format, Asymmetric>(args);
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

QNB_KERNEL(gemm_f32codes_avx2) = {.op = qnb::Op::gemm_f32codes, .cuts = {.rows = max_rows}, .gemm_f32codes = gemm};

// For each row m:  absmax = max_k |x[m,k]|,  scale[m] = absmax / 127,
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale[m]), -127, 127)
// scale 0: codes 0. A row with a NaN or an infinity: scale NaN, codes 0. With a given scale and zero point (static)
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale) + zero, -128, 127)
// With a divisor, x[m,k] / divisor[k] takes the place of x[m,k].
//
// The caller guarantees what kernel.h says of QuantizeRows.
// Why it is fast: the row is read twice, the second time from the cache, eight elements at a time; and a division is
// done only where it can matter. quantize_rows_float_avx512.cpp derives when: unless the product by 1 / scale lies
// within 2^-15 of a half, it rounds to the same integer as the quotient.
#include "float_avx2.h"

namespace {

using qnb::QuantizeRowsArgs;

constexpr int nearest_even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int64_t step = 4 * lanes;

__m256 divide_and_round(__m256 x, __m256 scale) {
  // Clamped first: a denormal scale can be so inexact that the quotient leaves the range. Rounding keeps the limits.
  const __m256 q = _mm256_div_ps(x, scale);
  const __m256 in_range = _mm256_max_ps(_mm256_min_ps(q, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f));
  return _mm256_round_ps(in_range, nearest_even);
}

uint32_t largest_lane(__m256i v) {
  alignas(32) uint32_t lane[lanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), v);
  uint32_t largest = 0;
  for (const uint32_t bits : lane) largest = bits > largest ? bits : largest;
  return largest;
}

template <class T, bool Divided>
void quantize_row(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const auto load = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    return load_divided<T, Divided>(args.x, m * K + k, args.divisor, k, count);
  };
  // The bits of non-negative floats order as integers do, with infinities and NaNs above all numbers.
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
  const auto magnitude = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    return _mm256_and_si256(_mm256_castps_si256(load(k, count)), magnitude_bits);
  };
  __m256i largest[4] = {};
  int64_t k = 0;
  for (; k + step <= K; k += step) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) largest[i] = _mm256_max_epu32(largest[i], magnitude(k + lanes * i, lanes));
  }
  for (; k < K; k += lanes) largest[0] = _mm256_max_epu32(largest[0], magnitude(k, K - k));
  const uint32_t absmax_bits = largest_lane(
      _mm256_max_epu32(_mm256_max_epu32(largest[0], largest[1]), _mm256_max_epu32(largest[2], largest[3])));

  const bool finite = absmax_bits < 0x7F800000;
  const float s = finite ? __builtin_bit_cast(float, absmax_bits) / 127.0f : __builtin_bit_cast(float, 0x7FC00000);
  args.scales[m] = s;
  const int64_t filled = finite && s != 0.0f ? K : 0;

  // Below 2^-100 the reciprocal comes near the end of the range, or the scale itself is denormal: divide.
  const bool reciprocal_is_exact_enough = s >= 0x1p-100f;
  const __m256 divisor = _mm256_set1_ps(s), factor = _mm256_set1_ps(1.0f / s);
  const __m256 near_half = _mm256_set1_ps(0.5f - 0x1p-15f), magnitude_mask = _mm256_castsi256_ps(magnitude_bits);
  // 32 codes. Four vectors share one question whether any lane is undecided: the branch is then rare and cheap.
  const auto codes_of = [&](const __m256(&v)[4]) __attribute__((always_inline)) {
    __m256 code[4], undecided = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256 product = _mm256_mul_ps(v[i], factor);
      code[i] = _mm256_round_ps(product, nearest_even);
      const __m256 fraction = _mm256_and_ps(_mm256_sub_ps(product, code[i]), magnitude_mask);
      undecided = _mm256_or_ps(undecided, _mm256_cmp_ps(fraction, near_half, _CMP_NLT_UQ));
    }
    if (_mm256_movemask_ps(undecided) != 0 || !reciprocal_is_exact_enough) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) code[i] = divide_and_round(v[i], divisor);
    }
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(code[0]), _mm256_cvtps_epi32(code[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(code[2]), _mm256_cvtps_epi32(code[3]));
    // Packing works on each half of a register alone; groups of four codes then go to their places.
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  };
  for (k = 0; k + step <= filled; k += step) {
    const __m256 v[4] = {load(k, lanes), load(k + lanes, lanes), load(k + 2 * lanes, lanes),
                         load(k + 3 * lanes, lanes)};
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), codes_of(v));
  }
  if (k < filled) {
    __m256 v[4] = {};
    for (int64_t i = 0; k + i * lanes < filled; ++i) v[i] = load(k + i * lanes, filled - k - i * lanes);
    alignas(32) int8_t rest[step];
    _mm256_store_si256(reinterpret_cast<__m256i*>(rest), codes_of(v));
    for (int64_t i = 0; k < filled; ++k, ++i) codes[k] = rest[i];
  }
  for (; k < ld_codes; ++k) codes[k] = 0;
}

template <class T, bool Divided>
void quantize_row_static(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const __m256 scale = _mm256_set1_ps(args.scale);
  const __m256 lowest = _mm256_set1_ps(static_cast<float>(-128 - args.zero));
  const __m256 highest = _mm256_set1_ps(static_cast<float>(127 - args.zero));
  const __m256i zero = _mm256_set1_epi32(args.zero), magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i largest = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k < K; k += lanes) {
    const int64_t count = K - k < lanes ? K - k : lanes;
    const __m256 v = load_divided<T, Divided>(args.x, m * K + k, args.divisor, k, count);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude_bits));
    // Clamped before the rounding, which keeps the limits, so that every quotient can become an integer.
    const __m256 q = _mm256_max_ps(_mm256_min_ps(_mm256_div_ps(v, scale), highest), lowest);
    const __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(q), zero);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
    if (count == lanes) {
      __builtin_memcpy(codes + k, &bytes, lanes);
    } else {
      for (int64_t i = 0; i < count; ++i) codes[k + i] = static_cast<int8_t>(bytes >> 8 * i);
    }
  }
  const bool finite = largest_lane(largest) < 0x7F800000;
  args.scales[m] = finite ? args.scale : __builtin_bit_cast(float, 0x7FC00000);
  for (k = finite ? K : 0; k < ld_codes; ++k) codes[k] = 0;
}

template <class T, bool Divided>
void dynamic_rows(const QuantizeRowsArgs& args) {
  for (int64_t m = 0; m < args.rows; ++m) quantize_row<T, Divided>(args, m);
}

template <class T, bool Divided>
void static_rows(const QuantizeRowsArgs& args) {
  for (int64_t m = 0; m < args.rows; ++m) quantize_row_static<T, Divided>(args, m);
}

template <class T>
void choose_divided(const QuantizeRowsArgs& args, bool is_static) {
  if (args.divisor == nullptr) return is_static ? static_rows<T, false>(args) : dynamic_rows<T, false>(args);
  return is_static ? static_rows<T, true>(args) : dynamic_rows<T, true>(args);
}

void choose_type(const QuantizeRowsArgs& args, bool is_static) {
  switch (args.x_dtype) {
    case QNB_F32:
      return choose_divided<F32>(args, is_static);
    case QNB_BF16:
      return choose_divided<Bf16>(args, is_static);
    default:
      return choose_divided<F16>(args, is_static);
  }
}

void quantize_rows(const QuantizeRowsArgs& args) { choose_type(args, false); }
void quantize_rows_static(const QuantizeRowsArgs& args) { choose_type(args, true); }

}  // namespace

QNB_KERNEL(quantize_rows_float_avx2) = {.op = qnb::Op::quantize_rows,
                                        .quantize_rows = quantize_rows,
                                        .quantize_rows_static = quantize_rows_static};

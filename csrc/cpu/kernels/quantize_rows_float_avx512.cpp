// For each row m:  absmax = max_k |x[m,k]|,  scale[m] = absmax / 127,
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale[m]), -127, 127)
// scale 0: codes 0. A row with a NaN or an infinity: scale NaN, codes 0. With a given scale and zero point (static)
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale) + zero, -128, 127)
// With a divisor, x[m,k] / divisor[k] takes the place of x[m,k].
//
// The caller guarantees what kernel.h says of QuantizeRows.
// Why it is fast: the row is read twice, the second time from the cache, sixteen elements at a time; and a division,
// which takes as long as ten products, is done only where it can matter. With i = 1 / scale rounded, the product x * i
// and the rounded quotient x / scale differ by less than |q| * 1.5 * 2^-23 + (second order) < 2^-15 for |q| <= 127.5.
// So they round to the same integer unless the product lies within 2^-15 of a half; then the division is done.
#include "float_avx512.h"

namespace {

using qnb::QuantizeRowsArgs;

constexpr int nearest_even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

__m512 divide_and_round(__m512 x, __m512 scale) {
  // Clamped first: a denormal scale can be so inexact that the quotient leaves the range. Rounding keeps the limits.
  const __m512 q = _mm512_div_ps(x, scale);
  const __m512 in_range =
      _mm512_max_ps(_mm512_min_ps(q, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-127.0f));
  return _mm512_roundscale_ps(in_range, nearest_even);
}

template <class T, bool Divided>
void quantize_row(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const auto load = [&](int64_t k, __mmask16 mask) {
    return load_divided<T, Divided>(args.x, m * K + k, args.divisor, k, mask);
  };
  // The bits of non-negative floats order as integers do, with infinities and NaNs above all numbers.
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  const auto magnitude = [&](int64_t k, __mmask16 mask) {
    return _mm512_and_si512(_mm512_castps_si512(load(k, mask)), magnitude_bits);
  };
  __m512i largest[4] = {};
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
    for (int i = 0; i < 4; ++i) largest[i] = _mm512_max_epu32(largest[i], magnitude(k + 16 * i, 0xFFFF));
  }
  for (; k < K; k += 16) largest[0] = _mm512_max_epu32(largest[0], magnitude(k, first_lanes(K - k)));
  const uint32_t absmax_bits = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(largest[0], largest[1]), _mm512_max_epu32(largest[2], largest[3])));

  const bool finite = absmax_bits < 0x7F800000;
  const float s = finite ? __builtin_bit_cast(float, absmax_bits) / 127.0f : __builtin_bit_cast(float, 0x7FC00000);
  args.scales[m] = s;
  const int64_t filled = finite && s != 0.0f ? K : 0;

  // Below 2^-100 the reciprocal comes near the end of the range, or the scale itself is denormal: divide.
  const bool reciprocal_is_exact_enough = s >= 0x1p-100f;
  const __m512 divisor = _mm512_set1_ps(s), factor = _mm512_set1_ps(1.0f / s);
  const __m512 near_half = _mm512_set1_ps(0.5f - 0x1p-15f);
  const auto store = [&](int64_t at, __mmask16 mask, __m512 code) {
    _mm_mask_storeu_epi8(codes + at, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
  };
  // Four vectors share one question whether any lane is undecided: the branch is then rare and cheap.
  for (k = 0; k < filled; k += 64) {
    __m512 v[4], code[4];
    __mmask16 masks[4];
    __mmask16 undecided = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      masks[i] = k + 16 * i < filled ? first_lanes(filled - k - 16 * i) : 0;
      v[i] = load(k + 16 * i, masks[i]);
      const __m512 product = _mm512_mul_ps(v[i], factor);
      code[i] = _mm512_roundscale_ps(product, nearest_even);
      const __m512 fraction = _mm512_abs_ps(_mm512_sub_ps(product, code[i]));
      undecided |= _mm512_cmp_ps_mask(fraction, near_half, _CMP_NLT_UQ);
    }
    if (undecided != 0 || !reciprocal_is_exact_enough) {
      for (int i = 0; i < 4; ++i) code[i] = divide_and_round(v[i], divisor);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(k + 16 * i, masks[i], code[i]);
  }
  for (k = filled; k < ld_codes; k += 16) {
    _mm_mask_storeu_epi8(codes + k, first_lanes(ld_codes - k), _mm_setzero_si128());
  }
}

template <class T, bool Divided>
void quantize_row_static(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const __m512 scale = _mm512_set1_ps(args.scale);
  const __m512 lowest = _mm512_set1_ps(static_cast<float>(-128 - args.zero));
  const __m512 highest = _mm512_set1_ps(static_cast<float>(127 - args.zero));
  const __m512i zero = _mm512_set1_epi32(args.zero), magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16) {
    const __mmask16 mask = first_lanes(K - k);
    const __m512 v = load_divided<T, Divided>(args.x, m * K + k, args.divisor, k, mask);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude_bits));
    // Clamped before the rounding, which keeps the limits, so that every quotient can become an integer.
    const __m512 q = _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(v, scale), highest), lowest);
    const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(q), zero);
    _mm_mask_storeu_epi8(codes + k, mask, _mm512_cvtepi32_epi8(code));
  }
  const bool finite = _mm512_reduce_max_epu32(largest) < 0x7F800000;
  args.scales[m] = finite ? args.scale : __builtin_bit_cast(float, 0x7FC00000);
  for (int64_t k = finite ? K : 0; k < ld_codes; k += 16) {
    _mm_mask_storeu_epi8(codes + k, first_lanes(ld_codes - k), _mm_setzero_si128());
  }
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

QNB_KERNEL(quantize_rows_float_avx512) = {.op = qnb::Op::quantize_rows,
                                          .quantize_rows = quantize_rows,
                                          .quantize_rows_static = quantize_rows_static};

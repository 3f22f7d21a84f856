// For each row m:  absmax = max_k |x[m,k]|,  scale[m] = absmax / 127,
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale[m]), -127, 127)
// scale 0: codes 0. A row with a NaN or an infinity: scale NaN, codes 0. With a given scale and zero point (static)
//                  code[m,k] = clamp(round_half_even(x[m,k] / scale) + zero, -128, 127)
// With a divisor, x[m,k] / divisor[k] takes the place of x[m,k].
//
// The caller guarantees what kernel.h says of QuantizeRows. This is the definition in plain C++; other kernels give
// the same bits.
#include "float_portable.h"

namespace {

using qnb::QuantizeRowsArgs;

// Adding and taking away 1.5 * 2^23 leaves no place for a fraction: the sum rounds half to even, for |v| < 2^22.
float round_half_even(float v) {
  const float shift = 12582912.0f;
  return (v + shift) - shift;
}

template <class T, bool Divided>
void quantize_row(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const auto load = [&](int64_t k) { return load_divided<T, Divided>(args.x, m * K + k, args.divisor, k); };
  // The bits of non-negative floats order as integers do, with infinities and NaNs above all numbers.
  uint32_t largest = 0;
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t magnitude = bits_of(load(k)) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < infinity_bits;
  const float s = finite ? float_of(largest) / 127.0f : float_of(0x7FC00000);
  args.scales[m] = s;
  const int64_t filled = finite && s != 0.0f ? K : 0;
  for (int64_t k = 0; k < filled; ++k) {
    // Clamped first: a denormal scale can be so inexact that the quotient leaves the range. Rounding keeps the limits.
    float q = load(k) / s;
    q = q > 127.0f ? 127.0f : q;
    q = q < -127.0f ? -127.0f : q;
    codes[k] = static_cast<int8_t>(round_half_even(q));
  }
  for (int64_t k = filled; k < ld_codes; ++k) codes[k] = 0;
}

template <class T, bool Divided>
void quantize_row_static(const QuantizeRowsArgs& args, int64_t m) {
  const int64_t K = args.K, ld_codes = args.ld_codes;
  int8_t* codes = args.codes + m * ld_codes;
  const float lowest = static_cast<float>(-128 - args.zero), highest = static_cast<float>(127 - args.zero);
  bool finite = true;
  for (int64_t k = 0; k < K; ++k) {
    const float v = load_divided<T, Divided>(args.x, m * K + k, args.divisor, k);
    finite &= (bits_of(v) & 0x7FFFFFFF) < infinity_bits;
    // Clamped before the rounding, which keeps the limits, so that every quotient can become an integer.
    float q = v / args.scale;
    q = q < highest ? q : highest;
    q = q > lowest ? q : lowest;
    codes[k] = static_cast<int8_t>(static_cast<int32_t>(round_half_even(q)) + args.zero);
  }
  args.scales[m] = finite ? args.scale : float_of(0x7FC00000);
  for (int64_t k = finite ? K : 0; k < ld_codes; ++k) codes[k] = 0;
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

QNB_KERNEL(quantize_rows_float_portable) = {.op = qnb::Op::quantize_rows,
                                            .quantize_rows = quantize_rows,
                                            .quantize_rows_static = quantize_rows_static};

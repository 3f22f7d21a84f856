// The product of float activations with packed codes, scales by group.
#include <bit>

#include "codes.h"
#include "float_product.h"

namespace qnb {
namespace {

// The value of an e4m3 code that is no NaN: 4 bits of exponent, whose bias is 7, 3 of mantissa, no infinities.
constexpr float e4m3(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  float v = exponent == 0 ? static_cast<float>(mantissa) / 8 : 1 + static_cast<float>(mantissa) / 8;
  for (uint32_t e = exponent == 0 ? 1 : exponent; e < 7; ++e) v /= 2;
  for (uint32_t e = 7; e < exponent; ++e) v *= 2;
  return code >= 128 ? -v : v;
}

struct E4m3 {
  uint32_t bits[256];
  constexpr E4m3() : bits() {
    for (uint32_t code = 0; code < 256; ++code) bits[code] = std::bit_cast<uint32_t>(e4m3(code));
  }
};
constexpr E4m3 e4m3_table;

// Whether a table of 256 is that of e4m3, which kernels can compute faster than look up.
bool is_e4m3(const float* table) {
  for (uint32_t code = 0; code < 256; ++code) {
    const auto bits = std::bit_cast<uint32_t>(table[code]);
    if ((code & 127) == 127 ? (bits & 0x7FFFFFFF) <= 0x7F800000 : bits != e4m3_table.bits[code]) return false;
  }
  return true;
}

}  // namespace
}  // namespace qnb

extern "C" {

int64_t qnb_linear_codes_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  return qnb::float_product_workspace_bytes(qnb::Op::gemm_f32codes, M, N, K, threads);
}

int32_t qnb_linear_codes(const void* x, int32_t x_dtype, const float* divisor, const uint8_t* packed, int32_t bits,
                         int64_t group, const float* scale, const float* zero, const float* table, const void* bias,
                         int32_t bias_dtype, int64_t M, int64_t N, int64_t K, void* out, int32_t out_dtype,
                         void* workspace, int64_t workspace_bytes, const qnb_parallel* parallel) {
  using namespace qnb;
  const FloatProduct p = {M, N, K, x, x_dtype, divisor, nullptr, bias, bias_dtype, out, out_dtype};
  if (const int32_t error = check(p)) return error;
  if (!is_bits(bits)) return QNB_ERROR_BITS;
  if (!is_group(group, K, 32)) return QNB_ERROR_GROUP;
  if (M == 0 || N == 0) return QNB_OK;
  if (K > 0 && (packed == nullptr || scale == nullptr)) return QNB_ERROR_NULL;

  float sixteen[16];
  CodeValues values = {bits, table, bits == 8 && table != nullptr && is_e4m3(table)};
  if (bits < 8) {
    for (int32_t code = 0; code < 16; ++code) {
      const int32_t i = code & ((1 << bits) - 1);
      sixteen[code] = table != nullptr ? table[i] : static_cast<float>(i - (1 << (bits - 1)));
    }
    values.values = sixteen;
  }
  const int64_t k_blocks = k_blocks_of(K), groups = ceil_div(K, group);
  return float_product(
      Op::gemm_f32codes, p, workspace, workspace_bytes, parallel,
      [&](const Kernel& kernel, const float* a, int64_t lda, int64_t rows, int64_t panel, float* acc) {
        const int64_t n = panel * panel_outputs;
        kernel.gemm_f32codes({.a = a,
                              .lda = lda,
                              .rows = rows,
                              .b = packed + panel * k_blocks * codes_block_bytes(bits),
                              .k_blocks = k_blocks,
                              .codes = values,
                              .scale = scale + n * groups,
                              .zero = zero == nullptr ? nullptr : zero + n * groups,
                              .outputs = std::min(panel_outputs, N - n),
                              .groups = groups,
                              .group = group,
                              .acc = acc,
                              .ld_acc = panel_outputs});
      });
}

}  // extern "C"

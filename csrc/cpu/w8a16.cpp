// The product of float activations with 8-bit weights, one scale an output.
#include "float_product.h"

extern "C" {

int64_t qnb_linear_w8a16_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  return qnb::float_product_workspace_bytes(qnb::Op::gemm_f32s8, M, N, K, threads);
}

int32_t qnb_linear_w8a16(const void* x, int32_t x_dtype, const float* divisor, const int8_t* packed,
                         const float* weight_scale, const void* bias, int32_t bias_dtype, int64_t M, int64_t N,
                         int64_t K, void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                         const qnb_parallel* parallel) {
  using namespace qnb;
  const FloatProduct p = {M, N, K, x, x_dtype, divisor, weight_scale, bias, bias_dtype, out, out_dtype};
  if (const int32_t error = check(p)) return error;
  if (M == 0 || N == 0) return QNB_OK;
  if (weight_scale == nullptr || (K > 0 && packed == nullptr)) return QNB_ERROR_NULL;
  const int64_t k_blocks = k_blocks_of(K);
  return float_product(
      Op::gemm_f32s8, p, workspace, workspace_bytes, parallel,
      [&](const Kernel& kernel, const float* a, int64_t lda, int64_t rows, int64_t panel, float* acc) {
        kernel.gemm_f32s8({.a = a,
                           .lda = lda,
                           .rows = rows,
                           .b = packed + panel * k_blocks * block_bytes,
                           .k_blocks = k_blocks,
                           .acc = acc,
                           .ld_acc = panel_outputs});
      });
}

}  // extern "C"

// acc[m,n] = sum over k of a[m,k] * w[n,k] in f32,  w[n,k] = (value of code[n,k] - zero[n,g]) * scale[n,g],
// for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32Codes, and rows <= max_rows. The order of the sum is that of
// gemm_f32s8_portable.cpp.
// Plain C++ for any processor. A block of codes becomes f32 weights once for all rows, whose sums wait in memory from
// one block to the next; the innermost loop runs over outputs.
#include "../kernel.h"
#include "codes_block.h"

namespace {

using qnb::GemmF32CodesArgs;

constexpr int64_t max_rows = 64;
constexpr int64_t outputs = qnb::panel_outputs;

// w[k][n] of a block.
void decode(const GemmF32CodesArgs& args, int64_t block, float (&w)[qnb::block_k][outputs]) {
  uint8_t codes[qnb::block_bytes];
  unpack_block(args.b + block * qnb::codes_block_bytes(args.codes.bits), args.codes.bits, codes);
  const float* values = args.codes.values;
  for (int64_t k = 0; k < qnb::block_k; ++k) {
    const int64_t at = (block * qnb::block_k + k) / args.group, g = at < args.groups ? at : args.groups - 1;
    for (int64_t n = 0; n < outputs; ++n) {
      const uint8_t code = codes[n / 16 * qnb::half_bytes + k / 4 * qnb::line_bytes + n % 16 * 4 + k % 4];
      float v = values == nullptr ? static_cast<float>(code) - 128.0f : values[code];
      if (n >= args.outputs) {
        v = 0.0f;
      } else {
        if (args.zero != nullptr) v -= args.zero[n * args.groups + g];
        v *= args.scale[n * args.groups + g];
      }
      w[k][n] = v;
    }
  }
}

void gemm(const GemmF32CodesArgs& args) {
  float sum[max_rows][4][outputs];
  for (int64_t m = 0; m < args.rows; ++m) {
    for (int64_t i = 0; i < 4 * outputs; ++i) sum[m][i / outputs][i % outputs] = 0.0f;
  }
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    float w[qnb::block_k][outputs];
    decode(args, block, w);
    for (int64_t m = 0; m < args.rows; ++m) {
      const float* a = args.a + m * args.lda + block * qnb::block_k;
      for (int64_t k = 0; k < qnb::block_k; ++k) {
        for (int64_t n = 0; n < outputs; ++n) sum[m][k % 4][n] += a[k] * w[k][n];
      }
    }
  }
  for (int64_t m = 0; m < args.rows; ++m) {
    for (int64_t n = 0; n < outputs; ++n) {
      args.acc[m * args.ld_acc + n] = (sum[m][0][n] + sum[m][1][n]) + (sum[m][2][n] + sum[m][3][n]);
    }
  }
}

}  // namespace

QNB_KERNEL(gemm_f32codes_portable) = {
    .op = qnb::Op::gemm_f32codes, .cuts = {.rows = max_rows}, .gemm_f32codes = gemm};

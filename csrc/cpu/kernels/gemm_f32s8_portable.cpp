// acc[m,n] = sum over k of a[m,k] * f32(w[n,k]) in f32, for all m < rows, n < 32, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmF32S8. For each output, k = 4 g + j is summed over g for each j
// apart, a product and a sum rounded one after the other, then the four sums are added as (0 + 1) + (2 + 3): an order
// that does not depend on the number of rows.
// Plain C++ for any processor. As in gemm_s8s8_portable.cpp, rows share widened weights and the innermost loop runs
// over outputs.
#include "../kernel.h"

namespace {

using qnb::GemmF32S8Args;

constexpr int64_t width = 16;

template <int Rows>
void multiply(const GemmF32S8Args& args, int64_t m, const int8_t* b, float* acc) {
  float sum[Rows][4][width] = {};
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    for (int64_t group = 0; group < 16; ++group) {
      const int8_t* line = b + block * qnb::block_bytes + group * qnb::line_bytes;
      for (int j = 0; j < 4; ++j) {
        float w[width];
        for (int64_t n = 0; n < width; ++n) w[n] = static_cast<float>(line[n * 4 + j]);
        // Unrolled on request: see gemm_s8s8_portable.cpp.
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) {
          const float a = args.a[(m + r) * args.lda + block * qnb::block_k + group * 4 + j];
          for (int64_t n = 0; n < width; ++n) sum[r][j][n] += a * w[n];
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      acc[r * args.ld_acc + n] = (sum[r][0][n] + sum[r][1][n]) + (sum[r][2][n] + sum[r][3][n]);
    }
  }
}

void gemm(const GemmF32S8Args& args) {
  for (int64_t half = 0; half < 2; ++half) {
    const int8_t* b = args.b + half * qnb::half_bytes;
    float* acc = args.acc + half * width;
    int64_t m = 0;
    for (; m + 2 <= args.rows; m += 2) multiply<2>(args, m, b, acc + m * args.ld_acc);
    for (; m < args.rows; ++m) multiply<1>(args, m, b, acc + m * args.ld_acc);
  }
}

}  // namespace

QNB_KERNEL(gemm_f32s8_portable) = {.op = qnb::Op::gemm_f32s8, .cuts = {.rows = 64}, .gemm_f32s8 = gemm};

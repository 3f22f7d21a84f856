// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], for all m < rows, n < 32 * panels, k < 64 * k_blocks.
//
// The caller guarantees what kernel.h says of GemmS8S8. The sum is exact: |acc| < 2^31 by the limit on K.
// Plain C++ for any processor. The sixteen sums of a line stay in registers, four rows share each weight that was read
// and widened, and the innermost loop runs over outputs, which compilers turn into whatever vectors the target has.
#include "../kernel.h"

namespace {

using qnb::GemmS8S8Args;

constexpr int64_t width = 16;

template <int Rows>
void multiply(const GemmS8S8Args& args, int64_t m, const int8_t* b, int32_t* acc) {
  int32_t sum[Rows][width];
  for (int r = 0; r < Rows; ++r) {
    for (int64_t n = 0; n < width; ++n) sum[r][n] = args.accumulate ? acc[r * args.ld_acc + n] : 0;
  }
  for (int64_t block = 0; block < args.k_blocks; ++block) {
    for (int64_t group = 0; group < 16; ++group) {
      const int8_t* line = b + block * qnb::block_bytes + group * qnb::line_bytes;
      int16_t w[4][width];
      for (int j = 0; j < 4; ++j) {
        for (int64_t n = 0; n < width; ++n) w[j][n] = line[n * 4 + j];
      }
      // Unrolled on request: GCC 12 else turns this loop into vectors and reads rows behind the last.
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const int8_t* a = args.a + (m + r) * args.lda + block * qnb::block_k + group * 4;
        const int32_t a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
        for (int64_t n = 0; n < width; ++n) {
          sum[r][n] += (a0 * w[0][n] + a1 * w[1][n]) + (a2 * w[2][n] + a3 * w[3][n]);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int64_t n = 0; n < width; ++n) acc[r * args.ld_acc + n] = sum[r][n];
  }
}

void gemm(const GemmS8S8Args& args) {
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    for (int64_t half = 0; half < 2; ++half) {
      const int8_t* b = args.b + panel * args.panel_stride + half * qnb::half_bytes;
      int32_t* acc = args.acc + panel * qnb::panel_outputs + half * width;
      int64_t m = 0;
      for (; m + 4 <= args.rows; m += 4) multiply<4>(args, m, b, acc + m * args.ld_acc);
      for (; m < args.rows; ++m) multiply<1>(args, m, b, acc + m * args.ld_acc);
    }
  }
}

}  // namespace

QNB_KERNEL(gemm_s8s8_portable) = {
    .op = qnb::Op::gemm_s8s8, .cuts = {.rows = 128, .panels = 8, .k_blocks = 8}, .gemm_s8s8 = gemm};

// wide[m,k] = f32(x[m,k]), or f32(x[m,k]) / divisor[k], for all m < rows, k < K; 0 for K <= k < ld_wide.
//
// The caller guarantees what kernel.h says of WidenRows. Fast because sixteen elements are widened at a time.
#include "float_avx512.h"

namespace {

using qnb::WidenRowsArgs;

template <class T, bool Divided>
void widen_all(const WidenRowsArgs& args) {
  const int64_t K = args.K;
  for (int64_t m = 0; m < args.rows; ++m) {
    float* to = args.wide + m * args.ld_wide;
    for (int64_t k = 0; k < args.ld_wide; k += 16) {
      const __mmask16 inside = k < K ? first_lanes(K - k) : 0;
      F32::store(to, k, first_lanes(args.ld_wide - k),
                 load_divided<T, Divided>(args.x, m * K + k, args.divisor, k, inside));
    }
  }
}

template <class T>
void widen(const WidenRowsArgs& args) {
  if (args.divisor == nullptr) return widen_all<T, false>(args);
  return widen_all<T, true>(args);
}

void widen_rows(const WidenRowsArgs& args) {
  switch (args.x_dtype) {
    case QNB_F32:
      return widen<F32>(args);
    case QNB_BF16:
      return widen<Bf16>(args);
    default:
      return widen<F16>(args);
  }
}

}  // namespace

QNB_KERNEL(widen_rows_float_avx512) = {.op = qnb::Op::widen_rows, .widen_rows = widen_rows};

#include "quantize_rows.h"

#include <limits>

#include "dispatch.h"
#include "parallel.h"
#include "sizes.h"

namespace qnb {
namespace {

constexpr double ns_per_element = 0.15;

int32_t checked(const QuantizeRowsArgs& args, Rows rows, const qnb_parallel* parallel) {
  if (!isa_setting_valid()) return QNB_ERROR_ISA;
  if (!sizes_fit(args.rows, 0, args.K)) return QNB_ERROR_SIZE;
  if (!is_dtype(args.x_dtype)) return QNB_ERROR_DTYPE;
  if (rows == Rows::fixed && !is_grid(args.scale, args.zero)) return QNB_ERROR_GRID;
  if (args.rows == 0) return QNB_OK;
  if (args.scales == nullptr || (args.K > 0 && (args.x == nullptr || args.codes == nullptr))) return QNB_ERROR_NULL;
  quantize_rows(args, rows, parallel);
  return QNB_OK;
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, Rows rows, const qnb_parallel* parallel) {
  const Kernel& kernel = *choose(Op::quantize_rows, args.rows).kernel;
  QuantizeRows* quantize = rows == Rows::dynamic ? kernel.quantize_rows : kernel.quantize_rows_static;
  const double ns = ns_per_element * static_cast<double>(args.rows) * static_cast<double>(args.K);
  for_shares(parallel, shares_for(ns, args.rows, parallel), args.rows, [&](int64_t, int64_t first, int64_t end) {
    QuantizeRowsArgs share = args;
    share.x = static_cast<const char*>(args.x) + first * args.K * bytes_of(args.x_dtype);
    share.rows = end - first;
    share.codes = args.codes + first * args.ld_codes;
    share.scales = args.scales + first;
    quantize(share);
  });
}

bool is_grid(float scale, int32_t zero) {
  return scale > 0 && scale <= std::numeric_limits<float>::max() && zero >= -128 && zero <= 127;
}

}  // namespace qnb

extern "C" {

int32_t qnb_quantize_rows(const void* x, int32_t x_dtype, const float* divisor, int64_t M, int64_t K, int8_t* codes,
                          float* scales, const qnb_parallel* parallel) {
  return qnb::checked({x, x_dtype, divisor, M, K, codes, K, scales, 0, 0}, qnb::Rows::dynamic, parallel);
}

int32_t qnb_quantize_rows_static(const void* x, int32_t x_dtype, const float* divisor, float scale, int32_t zero,
                                 int64_t M, int64_t K, int8_t* codes, float* scales, const qnb_parallel* parallel) {
  return qnb::checked({x, x_dtype, divisor, M, K, codes, K, scales, scale, zero}, qnb::Rows::fixed, parallel);
}

}  // extern "C"

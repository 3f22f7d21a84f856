// out[m,n] = cast(((f32(acc[m,n]) * row_scale[m]) * weight_scale[n]) + bias[n]), for all m < rows, n < columns.
//
// The caller guarantees what kernel.h says of Finish. This is the definition in plain C++; other kernels give the same
// bits (a NaN in f32 may differ in its payload).
#include "float_portable.h"

namespace {

using qnb::FinishArgs;

struct NoBias {};
struct Shifted {};

float load_sum(int32_t, const FinishArgs& args, int64_t i, int64_t) {
  return static_cast<float>(static_cast<const int32_t*>(args.acc)[i]);
}
float load_sum(float, const FinishArgs& args, int64_t i, int64_t) { return static_cast<const float*>(args.acc)[i]; }
float load_sum(Shifted, const FinishArgs& args, int64_t i, int64_t n) {
  const auto acc = static_cast<uint32_t>(static_cast<const int32_t*>(args.acc)[i]);
  return static_cast<float>(static_cast<int32_t>(acc + static_cast<uint32_t>(args.shift[n])));
}

template <class Acc, class Bias, class Out>
void finish_rows(const FinishArgs& args) {
  for (int64_t m = 0; m < args.rows; ++m) {
    // A factor of 1 changes no bit, so the weight-only product needs no loop of its own.
    const float row_scale = args.row_scale == nullptr ? 1.0f : args.row_scale[m];
    for (int64_t n = 0; n < args.columns; ++n) {
      float v = load_sum(Acc{}, args, m * args.ld_acc + n, n) * row_scale * args.weight_scale[n];
      if constexpr (!__is_same(Bias, NoBias)) v += Bias::load(args.bias, n);
      Out::store(args.out, m * args.ld_out + n, v);
    }
  }
}

template <class Acc, class Bias>
void with_bias(const FinishArgs& args) {
  switch (args.out_dtype) {
    case QNB_F32:
      return finish_rows<Acc, Bias, F32>(args);
    case QNB_BF16:
      return finish_rows<Acc, Bias, Bf16>(args);
    default:
      return finish_rows<Acc, Bias, F16>(args);
  }
}

template <class Acc>
void finish(const FinishArgs& args) {
  if (args.bias == nullptr) return with_bias<Acc, NoBias>(args);
  switch (args.bias_dtype) {
    case QNB_F32:
      return with_bias<Acc, F32>(args);
    case QNB_BF16:
      return with_bias<Acc, Bf16>(args);
    default:
      return with_bias<Acc, F16>(args);
  }
}

void finish_s32(const FinishArgs& args) {
  if (args.shift == nullptr) return finish<int32_t>(args);
  return finish<Shifted>(args);
}

}  // namespace

QNB_KERNEL(finish_float_portable) = {
    .op = qnb::Op::finish, .finish_s32 = finish_s32, .finish_f32 = finish<float>};

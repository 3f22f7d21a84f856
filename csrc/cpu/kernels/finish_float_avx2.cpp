// out[m,n] = cast(((f32(acc[m,n]) * row_scale[m]) * weight_scale[n]) + bias[n]), for all m < rows, n < columns.
//
// The caller guarantees what kernel.h says of Finish. Two products and a sum, each rounded: intrinsics, and this
// project's -ffp-contract=off, keep them apart although the instruction set could fuse them. Fast because eight results
// are made at a time, from sums that the product has just left in the cache, with one specialised loop for each pair of
// types.
#include "float_avx2.h"

namespace {

using qnb::FinishArgs;

struct NoBias {};
struct Shifted {};

__m256i load_s32(const int32_t* from, int64_t count) {
  return count >= lanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                        : _mm256_maskload_epi32(from, first_lanes(count));
}

// Sums i and on of acc, of which the first is column n's.
__m256 load_sum(int32_t, const FinishArgs& args, int64_t i, int64_t, int64_t count) {
  return _mm256_cvtepi32_ps(load_s32(static_cast<const int32_t*>(args.acc) + i, count));
}
__m256 load_sum(float, const FinishArgs& args, int64_t i, int64_t, int64_t count) {
  return F32::load(args.acc, i, count);
}
__m256 load_sum(Shifted, const FinishArgs& args, int64_t i, int64_t n, int64_t count) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(load_s32(static_cast<const int32_t*>(args.acc) + i, count),
                                             load_s32(args.shift + n, count)));
}

template <class Acc, class Bias, class Out>
void finish_rows(const FinishArgs& args) {
  for (int64_t m = 0; m < args.rows; ++m) {
    // A factor of 1 changes no bit, so the weight-only product needs no loop of its own.
    const __m256 row_scale = _mm256_set1_ps(args.row_scale == nullptr ? 1.0f : args.row_scale[m]);
    const auto step = [&](int64_t n, int64_t count) __attribute__((always_inline)) {
      __m256 v = _mm256_mul_ps(load_sum(Acc{}, args, m * args.ld_acc + n, n, count), row_scale);
      v = _mm256_mul_ps(v, F32::load(args.weight_scale, n, count));
      if constexpr (!__is_same(Bias, NoBias)) v = _mm256_add_ps(v, Bias::load(args.bias, n, count));
      Out::store(args.out, m * args.ld_out + n, count, v);
    };
    int64_t n = 0;
    for (; n + lanes <= args.columns; n += lanes) step(n, lanes);
    if (n < args.columns) step(n, args.columns - n);
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

QNB_KERNEL(finish_float_avx2) = {
    .op = qnb::Op::finish, .finish_s32 = finish_s32, .finish_f32 = finish<float>};

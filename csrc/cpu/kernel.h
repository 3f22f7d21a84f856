// What a kernel is: one function for one job on one instruction set, and the descriptor that its file ends with.
//
// A kernel file, kernels/<op>_<types>_<isa>.cpp, is compiled with its instruction set's flags. It therefore includes no
// C++ library header but <cstdint> (and the intrinsics), and keeps everything but the descriptor in an anonymous
// namespace: an inline function shared with baseline code could be emitted here, with instructions that the processor
// running the baseline lacks. Kernels allocate nothing, start no thread and check nothing: the drivers do.
#pragma once

#include <cstdint>

#include "../include/qnb.h"
#include "layout.h"

namespace qnb {

enum class Op : int32_t { quantize_rows, widen_rows, gemm_s8s8, gemm_f32s8, gemm_f32codes, group_codes, finish };

// Rows of x to s8 codes and scales, as qnb_quantize_rows or qnb_quantize_rows_static say. Codes of row m begin at
// codes + m * ld_codes, where ld_codes >= K; those from K to ld_codes are set to 0. divisor may be null.
struct QuantizeRowsArgs {
  const void* x;
  int32_t x_dtype;
  const float* divisor;
  int64_t rows = 0;
  int64_t K = 0;
  int8_t* codes = nullptr;
  int64_t ld_codes = 0;
  float* scales = nullptr;
  float scale = 0;  // given: quantize_rows_static alone reads these two
  int32_t zero = 0;
};
using QuantizeRows = void(const QuantizeRowsArgs& args);

// wide[m,k] = f32(x[m,k]), exact, for 0 <= m < rows, 0 <= k < K, and 0 for K <= k < ld_wide. A signaling NaN may become
// quiet. With a divisor (not null), f32(x[m,k]) / divisor[k].
struct WidenRowsArgs {
  const void* x;
  int32_t x_dtype;
  const float* divisor;
  int64_t rows;
  int64_t K;
  float* wide;
  int64_t ld_wide;
};
using WidenRows = void(const WidenRowsArgs& args);

// acc[m,n] (+)= sum over k of a[m,k] * w[n,k], exact modulo 2^32, for 0 <= m < rows, 0 <= n < 32 * panels,
// 0 <= k < 64 * k_blocks. Row m of a begins at a + m * lda; panel p of w at b + p * panel_stride, in the layout of
// layout.h. With `accumulate` the sum is added to acc, else it replaces it. The driver keeps within the kernel's cuts.
struct GemmS8S8Args {
  const int8_t* a;
  int64_t lda;
  int64_t rows;
  const int8_t* b;
  int64_t panel_stride;
  int64_t panels;
  int64_t k_blocks;
  int32_t* acc;
  int64_t ld_acc;
  bool accumulate;
};
using GemmS8S8 = void(const GemmS8S8Args& args);

// acc[m,n] = sum over k of a[m,k] * f32(w[n,k]) in f32, for one panel of 32 outputs; otherwise as above. The order of
// the sum must not depend on `rows`.
struct GemmF32S8Args {
  const float* a;
  int64_t lda;
  int64_t rows;
  const int8_t* b;
  int64_t k_blocks;
  float* acc;
  int64_t ld_acc;
};
using GemmF32S8 = void(const GemmF32S8Args& args);

// What the codes of a weight stand for. `values` holds 16 numbers for codes below 8 bits (the table of 4 or 8, over and
// over) and 256 for codes of 8, where null means code - 128. e4m3 promises that the 256 are those of that float format.
struct CodeValues {
  int32_t bits;
  const float* values;
  bool e4m3;
};

// acc[m,n] = sum over k of a[m,k] * w[n,k] in f32, for one panel of 32 outputs, where
//   w[n,k] = (value of code[n,k] - zero[n,g]) * scale[n,g], each step rounded,   g = min(k / group, groups - 1)
// Codes lie in the layout of layout.h. `group` is a multiple of 32, or groups is 1. scale, and zero where it is not null,
// are f32 (outputs, groups); outputs from `outputs` to 32 are padding: their scales are not read, their sums are any
// numbers. The order of the sum must not depend on `rows`.
struct GemmF32CodesArgs {
  const float* a;
  int64_t lda;
  int64_t rows;
  const uint8_t* b;
  int64_t k_blocks;
  CodeValues codes;
  const float* scale;
  const float* zero;
  int64_t outputs;
  int64_t groups;
  int64_t group;
  float* acc;
  int64_t ld_acc;
};
using GemmF32Codes = void(const GemmF32CodesArgs& args);

// `blocks` neighbouring blocks of codes become s8, code - 2^(bits - 1), in the same order of n and k.
using DecodeS8 = void(const uint8_t* packed, int32_t bits, int64_t blocks, int8_t* s8);

// total[m,n] = f32(acc[m,n]) * scale[n], or with `accumulate` total[m,n] + f32(acc[m,n]) * scale[n], a product and a sum
// rounded one after the other, for 0 <= m < rows, 0 <= n < columns. Both arrays have rows ld apart.
struct AddScaledArgs {
  const int32_t* acc;
  const float* scale;
  float* total;
  int64_t ld;
  int64_t rows;
  int64_t columns;
  bool accumulate;
};
using AddScaled = void(const AddScaledArgs& args);

// out[m,n] = cast(((f32(acc[m,n]) * row_scale[m]) * weight_scale[n]) + bias[n]) for 0 <= m < rows, 0 <= n < columns.
// bias may be null: nothing is added. out is in elements of out_dtype, its rows ld_out elements apart. Nothing outside
// the rows x columns is written, and no scale, shift or bias behind `columns` is read.
// The weight-only products pass a null row_scale: the factor is then left out. With a shift (not null; finish_s32 alone
// reads it) f32(acc[m,n] + shift[n]) takes the place of f32(acc[m,n]), the sum modulo 2^32.
struct FinishArgs {
  const void* acc;  // s32 for finish_s32, f32 for finish_f32
  int64_t ld_acc;
  const int32_t* shift;
  const float* row_scale;
  const float* weight_scale;
  const void* bias;
  int32_t bias_dtype;
  int64_t rows;
  int64_t columns;
  void* out;
  int64_t ld_out;
  int32_t out_dtype;
};
using Finish = void(const FinishArgs& args);

// How much of a product the driver hands to one call, so that what is reused stays in the cache meant for it.
struct Cuts {
  int64_t rows = 0;      // a (rows x k_blocks) and acc (rows x panels): L2
  int64_t panels = 0;    // how long a stays in use
  int64_t k_blocks = 0;  // b (one panel x k_blocks): L1
};

struct Kernel {
  Op op;
  int64_t min_rows = 0;  // for fewer rows of activations, a kernel after it in the list is quicker
  Cuts cuts = {};
  QuantizeRows* quantize_rows = nullptr;
  QuantizeRows* quantize_rows_static = nullptr;
  WidenRows* widen_rows = nullptr;
  GemmS8S8* gemm_s8s8 = nullptr;
  GemmF32S8* gemm_f32s8 = nullptr;
  GemmF32Codes* gemm_f32codes = nullptr;
  DecodeS8* decode_s8 = nullptr;
  AddScaled* add_scaled = nullptr;
  Finish* finish_s32 = nullptr;
  Finish* finish_f32 = nullptr;
};

}  // namespace qnb

// QNB_KERNEL(gemm_s8s8_amx) = {.op = ...};   The name is the file's: the build lists kernels by file name.
#define QNB_KERNEL(name)                             \
  extern "C" {                                       \
  extern const ::qnb::Kernel qnb_kernel_##name;      \
  }                                                  \
  const ::qnb::Kernel qnb_kernel_##name

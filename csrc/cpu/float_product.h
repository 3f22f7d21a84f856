// The driver of the products in f32: rows of activations become f32, each panel of the weight is multiplied with a chunk
// of them, and the sums become results. The kernel cuts K itself, because its partial sums take part in the order of the
// sum; the driver only cuts rows and shares out panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "sizes.h"
#include "workspace.h"

namespace qnb {

struct FloatProduct {
  int64_t M, N, K;
  const void* x;
  int32_t x_dtype;
  const float* divisor;
  const float* weight_scale;  // null: the weights were scaled before
  const void* bias;
  int32_t bias_dtype;
  void* out;
  int32_t out_dtype;
};

struct FloatPlan {
  const Kernel* kernel;
  int64_t rows, row_chunks, shares;

  FloatPlan(Op op, int64_t M, int64_t N, int64_t K, const qnb_parallel* parallel)
      : kernel(choose(op, M).kernel), row_chunks(ceil_div(M, kernel->cuts.rows)) {
    constexpr double macs_per_ns = 30, weights_per_ns = 10;
    rows = ceil_div(M, row_chunks);
    const double weights = static_cast<double>(N) * static_cast<double>(K);
    const double ns = std::max(weights / weights_per_ns, weights * static_cast<double>(M) / macs_per_ns);
    shares = shares_for(ns, row_chunks * panels_of(N), parallel);
  }
};

struct FloatScratch {
  Claims* claims;
  float* acc;
  float* x;

  FloatScratch(Workspace& workspace, const FloatPlan& plan, int64_t M, int64_t K)
      : claims(workspace.take<Claims>(plan.shares)),
        acc(workspace.take<float>(plan.shares * plan.rows * panel_outputs)),
        x(workspace.take<float>(M * row_stride(K))) {}
};

inline int64_t float_product_workspace_bytes(Op op, int64_t M, int64_t N, int64_t K, int32_t threads) {
  if (!sizes_fit(M, N, K)) return QNB_ERROR_SIZE;
  if (M == 0 || N == 0) return 0;
  // The plan looks at the number of threads alone; a function that is never called stands for the parallel-for.
  const qnb_parallel parallel = {
      [](void*, int64_t, void (*)(void*, int64_t), void*) {}, nullptr, threads};
  Workspace workspace(nullptr);
  FloatScratch(workspace, FloatPlan(op, M, N, K, &parallel), M, K);
  return workspace.bytes_to_ask_for();
}

// Everything but the weight and the workspace.
inline int32_t check(const FloatProduct& p) {
  if (!isa_setting_valid()) return QNB_ERROR_ISA;
  if (!sizes_fit(p.M, p.N, p.K)) return QNB_ERROR_SIZE;
  if (!is_dtype(p.x_dtype) || !is_dtype(p.out_dtype) || (p.bias != nullptr && !is_dtype(p.bias_dtype))) {
    return QNB_ERROR_DTYPE;
  }
  if (p.M == 0 || p.N == 0) return QNB_OK;
  return p.out == nullptr || (p.K > 0 && p.x == nullptr) ? QNB_ERROR_NULL : QNB_OK;
}

// A checked product, M and N above 0. multiply(kernel, a, lda, rows, panel, acc) leaves the sums of `rows` rows of f32
// activations, lda apart, with a panel of the weight in acc, rows of 32.
template <class Multiply>
int32_t float_product(Op op, const FloatProduct& p, void* workspace, int64_t workspace_bytes,
                      const qnb_parallel* parallel, const Multiply& multiply) {
  static constexpr float ones[panel_outputs] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  if (workspace == nullptr) return QNB_ERROR_NULL;
  const FloatPlan plan(op, p.M, p.N, p.K, parallel);
  Workspace space(workspace);
  const FloatScratch scratch(space, plan, p.M, p.K);
  if (space.used() > workspace_bytes) return QNB_ERROR_WORKSPACE;

  const bool copy = p.x_dtype != QNB_F32 || p.divisor != nullptr || !rows_usable(p.M, p.K);
  const int64_t lda = copy ? row_stride(p.K) : p.K;
  const float* a = static_cast<const float*>(p.x);
  if (copy) {
    constexpr double widen_ns = 0.1;  // an element
    const Kernel& widen = *choose(Op::widen_rows, p.M).kernel;
    const double ns = widen_ns * static_cast<double>(p.M) * static_cast<double>(p.K);
    for_shares(parallel, shares_for(ns, p.M, parallel), p.M, [&](int64_t, int64_t first, int64_t end) {
      widen.widen_rows({.x = static_cast<const char*>(p.x) + first * p.K * bytes_of(p.x_dtype),
                        .x_dtype = p.x_dtype,
                        .divisor = p.divisor,
                        .rows = end - first,
                        .K = p.K,
                        .wide = scratch.x + first * lda,
                        .ld_wide = lda});
    });
    a = scratch.x;
  }
  const Kernel& finish = *choose(Op::finish, p.M).kernel;
  const auto unit = [&](int64_t index, float* acc) {
    const int64_t m = index % plan.row_chunks * plan.rows, panel = index / plan.row_chunks;
    const int64_t rows = std::min(plan.rows, p.M - m), n = panel * panel_outputs;
    multiply(*plan.kernel, a + m * lda, lda, rows, panel, acc);
    finish.finish_f32({.acc = acc,
                       .ld_acc = panel_outputs,
                       .shift = nullptr,
                       .row_scale = nullptr,
                       .weight_scale = p.weight_scale == nullptr ? ones : p.weight_scale + n,
                       .bias = p.bias == nullptr ? nullptr
                                                 : static_cast<const char*>(p.bias) + n * bytes_of(p.bias_dtype),
                       .bias_dtype = p.bias_dtype,
                       .rows = rows,
                       .columns = std::min(panel_outputs, p.N - n),
                       .out = static_cast<char*>(p.out) + (m * p.N + n) * bytes_of(p.out_dtype),
                       .ld_out = p.N,
                       .out_dtype = p.out_dtype});
  };
  for_units(parallel, plan.shares, plan.row_chunks * panels_of(p.N), scratch.claims,
            [&](int64_t share, int64_t i) { unit(i, scratch.acc + share * plan.rows * panel_outputs); });
  return QNB_OK;
}

}  // namespace qnb

// The drivers of the 8-bit product: cut it into units, hand each unit to the kernels.
//
// A unit is a chunk of rows times a chunk of panels. Within it K is cut so that a piece of a panel stays in the first
// cache while all rows of the chunk pass by; sums wait in an s32 scratch that belongs to the share; the last step turns
// them into results while they are still in the cache. Consecutive units share their panels: weights are read once from
// memory, activations, which are smaller, again and again.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "quantize_rows.h"
#include "sizes.h"
#include "workspace.h"

namespace qnb {
namespace {

// What a thread does in a nanosecond, roughly: it only decides how many threads a product is worth.
constexpr double macs_per_ns = 150;
constexpr double weight_bytes_per_ns = 15;
constexpr double copy_ns_per_byte = 0.1;

struct Problem {
  int64_t M, N, K;
  const qnb_parallel* parallel;
};

// How a product is cut. Made once for a call: the kernel that it names, and so the cuts, may change with the ceiling.
struct Plan {
  const Kernel* kernel;
  int64_t rows;     // of a chunk
  int64_t panels;   // of a chunk
  int64_t row_chunks;
  int64_t panel_chunks;
  int64_t shares;
  int64_t ld_acc;

  explicit Plan(const Problem& p) : kernel(choose(Op::gemm_s8s8, p.M).kernel) {
    const Cuts& cuts = kernel->cuts;
    const double weights = static_cast<double>(p.N) * static_cast<double>(p.K);
    const double ns = std::max(weights / weight_bytes_per_ns, weights * static_cast<double>(p.M) / macs_per_ns);
    const int64_t all_panels = panels_of(p.N);
    row_chunks = ceil_div(p.M, cuts.rows);
    shares = shares_for(ns, row_chunks * all_panels, p.parallel);
    // Chunks of panels: few enough panels each, and a multiple of the shares in number, so that no thread waits long.
    panel_chunks = std::min(all_panels, shares * ceil_div(all_panels, shares * cuts.panels));
    panels = ceil_div(all_panels, panel_chunks);
    panel_chunks = ceil_div(all_panels, panels);
    if (row_chunks * panel_chunks < shares) row_chunks = ceil_div(shares, panel_chunks);
    rows = ceil_div(p.M, row_chunks);
    row_chunks = ceil_div(p.M, rows);
    shares = std::min(shares, row_chunks * panel_chunks);
    // One line more than the panels need: rows of a power of two apart would fall on the same lines of the cache.
    ld_acc = panels * panel_outputs + 16;
  }
};

struct Scratch {
  Claims* claims;
  int32_t* acc;
  int8_t* codes;  // rows row_stride apart
  float* row_scale;
};

Scratch take_scratch(Workspace& workspace, const Problem& p, const Plan& plan, bool codes, bool row_scale) {
  Scratch s = {};
  s.claims = workspace.take<Claims>(plan.shares);
  s.acc = workspace.take<int32_t>(plan.shares * plan.rows * plan.ld_acc);
  if (codes) s.codes = workspace.take<int8_t>(p.M * row_stride(p.K));
  if (row_scale) s.row_scale = workspace.take<float>(p.M);
  return s;
}

struct Epilogue {
  const int32_t* shift;
  const float* row_scale;
  const float* weight_scale;
  const void* bias;
  int32_t bias_dtype;
  void* out;
  int32_t out_dtype;
};

// codes: rows ld_codes apart, zero from K to the end of the last block.
void multiply(const Problem& p, const Plan& plan, const int8_t* codes, int64_t ld_codes, const int8_t* packed,
              const Epilogue& e, const Scratch& scratch) {
  const Kernel& finish = *choose(Op::finish, p.M).kernel;
  const Cuts& cuts = plan.kernel->cuts;
  const int64_t k_blocks = k_blocks_of(p.K), panel_stride = k_blocks * block_bytes, all_panels = panels_of(p.N);
  const auto unit = [&](int64_t index, int32_t* acc) {
    const int64_t m = index % plan.row_chunks * plan.rows, panel = index / plan.row_chunks * plan.panels;
    const int64_t rows = std::min(plan.rows, p.M - m), panels = std::min(plan.panels, all_panels - panel);
    if (k_blocks == 0) std::memset(acc, 0, static_cast<size_t>(rows * plan.ld_acc) * sizeof *acc);
    // A few rows make the product wait for memory alone: the weights are then read front to back, K uncut.
    const int64_t cut = rows < 16 ? std::max<int64_t>(k_blocks, 1) : cuts.k_blocks;
    for (int64_t block = 0; block < k_blocks; block += cut) {
      plan.kernel->gemm_s8s8({.a = codes + m * ld_codes + block * block_k,
                              .lda = ld_codes,
                              .rows = rows,
                              .b = packed + panel * panel_stride + block * block_bytes,
                              .panel_stride = panel_stride,
                              .panels = panels,
                              .k_blocks = std::min(cut, k_blocks - block),
                              .acc = acc,
                              .ld_acc = plan.ld_acc,
                              .accumulate = block > 0});
    }
    const int64_t n = panel * panel_outputs;
    finish.finish_s32({.acc = acc,
                       .ld_acc = plan.ld_acc,
                       .shift = e.shift == nullptr ? nullptr : e.shift + n,
                       .row_scale = e.row_scale + m,
                       .weight_scale = e.weight_scale + n,
                       .bias = e.bias == nullptr ? nullptr
                                                 : static_cast<const char*>(e.bias) + n * bytes_of(e.bias_dtype),
                       .bias_dtype = e.bias_dtype,
                       .rows = rows,
                       .columns = std::min(panels * panel_outputs, p.N - n),
                       .out = static_cast<char*>(e.out) + (m * p.N + n) * bytes_of(e.out_dtype),
                       .ld_out = p.N,
                       .out_dtype = e.out_dtype});
  };
  for_units(p.parallel, plan.shares, plan.row_chunks * plan.panel_chunks, scratch.claims,
            [&](int64_t share, int64_t i) { unit(i, scratch.acc + share * plan.rows * plan.ld_acc); });
}

int32_t check(const Problem& p, const void* input, const void* packed, const Epilogue& e) {
  if (!isa_setting_valid()) return QNB_ERROR_ISA;
  if (!sizes_fit(p.M, p.N, p.K)) return QNB_ERROR_SIZE;
  if (p.K > (e.shift == nullptr ? QNB_MAX_K : QNB_MAX_K_SHIFTED)) return QNB_ERROR_K;
  if (!is_dtype(e.out_dtype) || (e.bias != nullptr && !is_dtype(e.bias_dtype))) return QNB_ERROR_DTYPE;
  if (p.M == 0 || p.N == 0) return QNB_OK;
  if (e.weight_scale == nullptr || e.out == nullptr) return QNB_ERROR_NULL;
  if (p.K > 0 && (input == nullptr || packed == nullptr)) return QNB_ERROR_NULL;
  return QNB_OK;
}

int64_t workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads, bool codes, bool row_scale) {
  if (!sizes_fit(M, N, K)) return QNB_ERROR_SIZE;
  if (M == 0 || N == 0) return 0;
  // The plan looks at the number of threads alone; a function that is never called stands for the parallel-for.
  const qnb_parallel parallel = {
      [](void*, int64_t, void (*)(void*, int64_t), void*) {}, nullptr, threads};
  Workspace workspace(nullptr);
  const Problem p = {M, N, K, &parallel};
  take_scratch(workspace, p, Plan(p), codes, row_scale);
  return workspace.bytes_to_ask_for();
}

// Rows of x to codes, by their own scales or by a given one, then the product. e.row_scale is set here.
int32_t linear(const Problem& p, QuantizeRowsArgs x, Rows kind, const int8_t* packed, Epilogue e, void* workspace,
               int64_t workspace_bytes) {
  if (const int32_t error = check(p, x.x, packed, e)) return error;
  if (!is_dtype(x.x_dtype)) return QNB_ERROR_DTYPE;
  if (kind == Rows::fixed && !is_grid(x.scale, x.zero)) return QNB_ERROR_GRID;
  if (p.M == 0 || p.N == 0) return QNB_OK;
  if (workspace == nullptr) return QNB_ERROR_NULL;
  const Plan plan(p);
  Workspace space(workspace);
  const Scratch scratch = take_scratch(space, p, plan, true, true);
  if (space.used() > workspace_bytes) return QNB_ERROR_WORKSPACE;
  x.rows = p.M, x.K = p.K;
  x.codes = scratch.codes, x.ld_codes = row_stride(p.K);
  e.row_scale = x.scales = scratch.row_scale;
  quantize_rows(x, kind, p.parallel);
  multiply(p, plan, scratch.codes, x.ld_codes, packed, e, scratch);
  return QNB_OK;
}

}  // namespace
}  // namespace qnb

extern "C" {

int64_t qnb_gemm_w8a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  return qnb::workspace_bytes(M, N, K, threads, !qnb::rows_usable(M, K), false);
}

int32_t qnb_gemm_w8a8(const int8_t* codes, const float* row_scale, const int8_t* packed, const float* weight_scale,
                      const int32_t* shift, const void* bias, int32_t bias_dtype, int64_t M, int64_t N, int64_t K,
                      void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                      const qnb_parallel* parallel) {
  using namespace qnb;
  const Problem p = {M, N, K, parallel};
  const Epilogue e = {shift, row_scale, weight_scale, bias, bias_dtype, out, out_dtype};
  if (const int32_t error = check(p, codes, packed, e)) return error;
  if (M == 0 || N == 0) return QNB_OK;
  if (row_scale == nullptr || workspace == nullptr) return QNB_ERROR_NULL;
  const bool copy = !rows_usable(M, K);
  const Plan plan(p);
  Workspace space(workspace);
  const Scratch scratch = take_scratch(space, p, plan, copy, false);
  if (space.used() > workspace_bytes) return QNB_ERROR_WORKSPACE;
  const int64_t ld_codes = copy ? row_stride(K) : K;
  if (copy) {
    const double ns = copy_ns_per_byte * static_cast<double>(M) * static_cast<double>(K);
    for_shares(parallel, shares_for(ns, M, parallel), M, [&](int64_t, int64_t first, int64_t end) {
      for (int64_t m = first; m < end; ++m) {
        std::memcpy(scratch.codes + m * ld_codes, codes + m * K, static_cast<size_t>(K));
        std::memset(scratch.codes + m * ld_codes + K, 0, static_cast<size_t>(ld_codes - K));
      }
    });
  }
  multiply(p, plan, copy ? scratch.codes : codes, ld_codes, packed, e, scratch);
  return QNB_OK;
}

int64_t qnb_linear_w8a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  return qnb::workspace_bytes(M, N, K, threads, true, true);
}

int32_t qnb_linear_w8a8(const void* x, int32_t x_dtype, const float* divisor, const int8_t* packed,
                        const float* weight_scale, const void* bias, int32_t bias_dtype, int64_t M, int64_t N,
                        int64_t K, void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                        const qnb_parallel* parallel) {
  return qnb::linear({M, N, K, parallel}, {.x = x, .x_dtype = x_dtype, .divisor = divisor}, qnb::Rows::dynamic, packed,
                     {nullptr, nullptr, weight_scale, bias, bias_dtype, out, out_dtype}, workspace, workspace_bytes);
}

int64_t qnb_linear_w8a8_static_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  return qnb_linear_w8a8_workspace_bytes(M, N, K, threads);
}

int32_t qnb_linear_w8a8_static(const void* x, int32_t x_dtype, const float* divisor, float scale, int32_t zero,
                               const int8_t* packed, const float* weight_scale, const int32_t* shift, const void* bias,
                               int32_t bias_dtype, int64_t M, int64_t N, int64_t K, void* out, int32_t out_dtype,
                               void* workspace, int64_t workspace_bytes, const qnb_parallel* parallel) {
  return qnb::linear({M, N, K, parallel},
                     {.x = x, .x_dtype = x_dtype, .divisor = divisor, .scale = scale, .zero = zero}, qnb::Rows::fixed,
                     packed, {shift, nullptr, weight_scale, bias, bias_dtype, out, out_dtype}, workspace,
                     workspace_bytes);
}

}  // extern "C"

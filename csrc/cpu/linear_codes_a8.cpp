// The product of row-quantized activations with packed codes: integers inside a group, f32 from group to group.
//
// A unit is a chunk of rows times a chunk of panels. A group's codes of all its panels become s8 in a buffer of the
// first caches; the 8-bit product takes them from there as it takes any packed weight; its sums, scaled, are added to
// f32 totals. That way every kernel of the 8-bit product serves here too.
#include <algorithm>

#include "codes.h"
#include "dispatch.h"
#include "parallel.h"
#include "quantize_rows.h"
#include "sizes.h"
#include "workspace.h"

namespace qnb {
namespace {

constexpr int64_t max_rows = 64;        // sums and totals stay in the second cache
constexpr int64_t max_panels = 8;       // what one pass over the rows' codes is shared by
constexpr int64_t max_blocks = 4;       // of each panel, decoded at a time
constexpr int64_t columns = max_panels * panel_outputs;
constexpr int64_t scale_groups = 16;    // whose scales are brought into the order of the columns at a time
constexpr int64_t ld = columns + 16;    // see Plan::ld_acc in w8a8.cpp
constexpr double macs_per_ns = 80;
constexpr double weights_per_ns = 10;

struct Plan {
  const Kernel* kernel;
  int64_t rows, row_chunks, panels, panel_chunks, shares;

  Plan(int64_t M, int64_t N, int64_t K, const qnb_parallel* parallel) : kernel(choose(Op::gemm_s8s8, M).kernel) {
    const double weights = static_cast<double>(N) * static_cast<double>(K);
    const double ns = std::max(weights / weights_per_ns, weights * static_cast<double>(M) / macs_per_ns);
    const int64_t all_panels = panels_of(N);
    row_chunks = ceil_div(M, std::min(max_rows, kernel->cuts.rows));
    rows = ceil_div(M, row_chunks);
    shares = shares_for(ns, row_chunks * all_panels, parallel);
    // A multiple of the shares in number, so that no thread waits long.
    panel_chunks = std::min(all_panels, shares * ceil_div(all_panels, shares * max_panels));
    panels = ceil_div(all_panels, panel_chunks);
    panel_chunks = ceil_div(all_panels, panels);
    shares = std::min(shares, row_chunks * panel_chunks);
  }
};

// Of one share.
struct Scratch {
  int32_t* acc;   // rows x columns, ld apart
  float* total;   // as acc
  float* scales;  // scale_groups x columns
  int8_t* s8;     // max_panels x max_blocks blocks
};

struct AllScratch {
  Claims* claims;
  int8_t* codes;  // rows row_stride apart
  float* row_scale;
  char* shares;
  int64_t share_bytes;

  AllScratch(Workspace& workspace, const Plan& plan, int64_t M, int64_t K)
      : claims(workspace.take<Claims>(plan.shares)),
        codes(workspace.take<int8_t>(M * row_stride(K))),
        row_scale(workspace.take<float>(M)) {
    Workspace one(nullptr);
    take(one, plan);
    share_bytes = one.used();
    shares = workspace.take<char>(plan.shares * share_bytes);
  }

  Scratch of(int64_t share, const Plan& plan) const {
    Workspace one(shares + share * share_bytes);
    return take(one, plan);
  }

 private:
  static Scratch take(Workspace& workspace, const Plan& plan) {
    Scratch s;
    s.acc = workspace.take<int32_t>(plan.rows * ld);
    s.total = workspace.take<float>(plan.rows * ld);
    s.scales = workspace.take<float>(scale_groups * columns);
    s.s8 = workspace.take<int8_t>(max_panels * max_blocks * block_bytes);
    return s;
  }
};

struct Weight {
  const uint8_t* packed;
  int32_t bits;
  int64_t group, groups, k_blocks;
  const float* scale;
};

// total = what the groups of panels [panel, panel + panels) add up to for `rows` rows of codes. There is a K.
void sum_groups(const Plan& plan, const Weight& w, const int8_t* codes, int64_t ld_codes, int64_t rows, int64_t panel,
                int64_t panels, int64_t outputs, const Kernel& jobs, const Scratch& s) {
  const int64_t bytes = codes_block_bytes(w.bits), group_blocks = ceil_div(w.group, block_k);
  for (int64_t g = 0; g < w.groups; ++g) {
    if (g % scale_groups == 0) {
      const int64_t some = std::min(scale_groups, w.groups - g);
      for (int64_t n = 0; n < outputs; ++n) {
        const float* from = w.scale + (panel * panel_outputs + n) * w.groups + g;
        for (int64_t i = 0; i < some; ++i) s.scales[i * columns + n] = from[i];
      }
    }
    // The last group may be short; one group may be longer than all of K.
    const int64_t begin = g * group_blocks, end = w.groups == 1 ? w.k_blocks : std::min(begin + group_blocks, w.k_blocks);
    for (int64_t block = begin; block < end; block += max_blocks) {
      const int64_t blocks = std::min(max_blocks, end - block);
      for (int64_t i = 0; i < panels; ++i) {
        jobs.decode_s8(w.packed + ((panel + i) * w.k_blocks + block) * bytes, w.bits, blocks,
                       s.s8 + i * blocks * block_bytes);
      }
      plan.kernel->gemm_s8s8({.a = codes + block * block_k,
                              .lda = ld_codes,
                              .rows = rows,
                              .b = s.s8,
                              .panel_stride = blocks * block_bytes,
                              .panels = panels,
                              .k_blocks = blocks,
                              .acc = s.acc,
                              .ld_acc = ld,
                              .accumulate = block > begin});
    }
    jobs.add_scaled({.acc = s.acc,
                     .scale = s.scales + g % scale_groups * columns,
                     .total = s.total,
                     .ld = ld,
                     .rows = rows,
                     .columns = outputs,
                     .accumulate = g > 0});
  }
}

}  // namespace
}  // namespace qnb

extern "C" {

int64_t qnb_linear_codes_a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads) {
  using namespace qnb;
  if (!sizes_fit(M, N, K)) return QNB_ERROR_SIZE;
  if (M == 0 || N == 0) return 0;
  const qnb_parallel parallel = {
      [](void*, int64_t, void (*)(void*, int64_t), void*) {}, nullptr, threads};
  Workspace workspace(nullptr);
  AllScratch(workspace, Plan(M, N, K, &parallel), M, K);
  return workspace.bytes_to_ask_for();
}

int32_t qnb_linear_codes_a8(const void* x, int32_t x_dtype, const float* divisor, const uint8_t* packed, int32_t bits,
                            int64_t group, const float* scale, const void* bias, int32_t bias_dtype, int64_t M,
                            int64_t N, int64_t K, void* out, int32_t out_dtype, void* workspace,
                            int64_t workspace_bytes, const qnb_parallel* parallel) {
  using namespace qnb;
  if (!isa_setting_valid()) return QNB_ERROR_ISA;
  if (!sizes_fit(M, N, K)) return QNB_ERROR_SIZE;
  if (!is_dtype(x_dtype) || !is_dtype(out_dtype) || (bias != nullptr && !is_dtype(bias_dtype))) {
    return QNB_ERROR_DTYPE;
  }
  if (!is_bits(bits)) return QNB_ERROR_BITS;
  if (!is_group(group, K, block_k)) return QNB_ERROR_GROUP;
  if (std::min(group, K) > QNB_MAX_K) return QNB_ERROR_K;
  if (M == 0 || N == 0) return QNB_OK;
  if (out == nullptr || workspace == nullptr) return QNB_ERROR_NULL;
  if (K > 0 && (x == nullptr || packed == nullptr || scale == nullptr)) return QNB_ERROR_NULL;
  const Plan plan(M, N, K, parallel);
  Workspace space(workspace);
  const AllScratch scratch(space, plan, M, K);
  if (space.used() > workspace_bytes) return QNB_ERROR_WORKSPACE;

  const int64_t ld_codes = row_stride(K), all_panels = panels_of(N);
  quantize_rows({.x = x,
                 .x_dtype = x_dtype,
                 .divisor = divisor,
                 .rows = M,
                 .K = K,
                 .codes = scratch.codes,
                 .ld_codes = ld_codes,
                 .scales = scratch.row_scale},
                Rows::dynamic, parallel);
  const Weight weight = {packed, bits, group, ceil_div(K, group), k_blocks_of(K), scale};
  const Kernel &jobs = *choose(Op::group_codes, M).kernel, &finish = *choose(Op::finish, M).kernel;
  float ones[columns];
  std::fill_n(ones, columns, 1.0f);
  for_units(parallel, plan.shares, plan.row_chunks * plan.panel_chunks, scratch.claims, [&](int64_t share, int64_t i) {
    const int64_t m = i % plan.row_chunks * plan.rows, panel = i / plan.row_chunks * plan.panels;
    const int64_t rows = std::min(plan.rows, M - m), panels = std::min(plan.panels, all_panels - panel);
    const int64_t n = panel * panel_outputs, outputs = std::min(panels * panel_outputs, N - n);
    const Scratch s = scratch.of(share, plan);
    if (K == 0) std::fill_n(s.total, rows * ld, 0.0f);
    sum_groups(plan, weight, scratch.codes + m * ld_codes, ld_codes, rows, panel, panels, outputs, jobs, s);
    finish.finish_f32({.acc = s.total,
                       .ld_acc = ld,
                       .shift = nullptr,
                       .row_scale = scratch.row_scale + m,
                       .weight_scale = ones,
                       .bias = bias == nullptr ? nullptr : static_cast<const char*>(bias) + n * bytes_of(bias_dtype),
                       .bias_dtype = bias_dtype,
                       .rows = rows,
                       .columns = outputs,
                       .out = static_cast<char*>(out) + (m * N + n) * bytes_of(out_dtype),
                       .ld_out = N,
                       .out_dtype = out_dtype});
  });
  return QNB_OK;
}

}  // extern "C"

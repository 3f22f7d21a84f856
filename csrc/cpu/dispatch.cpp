#include "dispatch.h"

#include <cstring>

// Written by CMake from the names of the files in kernels/, best instruction set first:
//   QNB_LISTED(<file name without ending>, <instruction set>)
#define QNB_LISTED(name, isa) extern "C" const qnb::Kernel qnb_kernel_##name;
#include "qnb_kernels.inc"
#undef QNB_LISTED

namespace qnb {
namespace {

const Listed list[] = {
#define QNB_LISTED(name, isa) {&qnb_kernel_##name, isa_##isa},
#include "qnb_kernels.inc"
#undef QNB_LISTED
};

}  // namespace

const Listed& choose(Op op, int64_t rows) {
  const Listed* last = nullptr;
  for (const Listed& entry : list) {
    if (entry.kernel->op != op || !isa_allowed(entry.isa) || !processor_has(entry.isa)) continue;
    last = &entry;
    if (rows >= entry.kernel->min_rows) break;
  }
  return *last;
}

bool built_for(Isa isa) {
  for (const Listed& entry : list) {
    if (entry.isa == isa) return true;
  }
  return false;
}

}  // namespace qnb

extern "C" {

const char* qnb_kernel_for_rows(const char* op, int64_t M) {
  using qnb::Op;
  struct Name {
    const char* op;
    Op job;
  };
  static const Name names[] = {{"quantize_rows", Op::quantize_rows},
                               {"quantize_rows_static", Op::quantize_rows},
                               {"gemm_w8a8", Op::gemm_s8s8},
                               {"linear_w8a8", Op::gemm_s8s8},
                               {"linear_w8a8_static", Op::gemm_s8s8},
                               {"linear_w8a16", Op::gemm_f32s8},
                               {"linear_codes", Op::gemm_f32codes},
                               {"linear_codes_a8", Op::gemm_s8s8}};
  if (op == nullptr) return nullptr;
  for (const Name& name : names) {
    if (std::strcmp(op, name.op) == 0) return qnb_isa_name(qnb::choose(name.job, M).isa);
  }
  static const char* const packing[] = {"pack_w8", "unpack_w8", "pack_codes", "unpack_codes"};
  for (const char* name : packing) {
    if (std::strcmp(op, name) == 0) return qnb_isa_name(qnb::isa_portable);
  }
  return nullptr;
}

const char* qnb_kernel_for(const char* op) { return qnb_kernel_for_rows(op, INT64_MAX); }

}  // extern "C"

#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../include/qnb.h"
#include "dispatch.h"

#if defined(__x86_64__) || defined(_M_X64)
#define QNB_X86_64 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qnb {
namespace {

// What the columns `needs` of isa.def ask for: the processor has it and the operating system saves its registers.
struct Features {
  bool avx2 = false;  // with fma and f16c, which every processor that has it has too
  bool avxvnni = false;
  bool avx512 = false;  // f, bw, vl and dq
  bool avx512vnni = false;
  bool amx_int8 = false;
};

#ifdef QNB_X86_64
struct Leaf {
  uint32_t a, b, c, d;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf r = {};
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
#endif
  return r;
}

// The register sets that the operating system saves at a switch of threads (XCR0).
uint64_t saved_registers() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
#endif
}

// Linux gives a process the tile registers only when it asks; threads started before or after share the permission.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023;
  constexpr long xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}
#endif

Features detect() {
  Features has;
#ifdef QNB_X86_64
  const auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
  const Leaf leaf1 = cpuid(1, 0);
  if (cpuid(0, 0).a < 7 || !bit(leaf1.c, 27)) return has;  // 27: OSXSAVE, without which xgetbv faults
  const uint64_t saved = saved_registers();
  const Leaf leaf7 = cpuid(7, 0);
  constexpr uint64_t ymm_state = 0x6;       // xmm and ymm registers
  constexpr uint64_t zmm_state = 0xE6;      // xmm, ymm, mask registers, both parts of zmm
  constexpr uint64_t tile_state = 0x60000;  // tile configuration and data
  has.avx2 = (saved & ymm_state) == ymm_state && bit(leaf1.c, 12) && bit(leaf1.c, 28) && bit(leaf1.c, 29) &&
             bit(leaf7.b, 5);  // fma, avx, f16c, avx2
  // Leaf 7 says in eax how many more pages it has.
  has.avxvnni = has.avx2 && leaf7.a >= 1 && bit(cpuid(7, 1).a, 4);
  has.avx512 = (saved & zmm_state) == zmm_state && bit(leaf7.b, 16) && bit(leaf7.b, 17) && bit(leaf7.b, 30) &&
               bit(leaf7.b, 31);  // f, dq, bw, vl
  has.avx512vnni = has.avx512 && bit(leaf7.c, 11);
  has.amx_int8 = (saved & tile_state) == tile_state && bit(leaf7.d, 24) && bit(leaf7.d, 25) && ask_for_tiles();
#endif
  return has;
}

const char* const names[isa_count] = {
#define QNB_ISA(name, bit, flags, needs) #name,
#include "../isa.def"
#undef QNB_ISA
};

int32_t index_of(const char* name) {
  for (int32_t i = 0; i < isa_count; ++i) {
    if (std::strcmp(names[i], name) == 0) return i;
  }
  return -1;
}

// The ceiling: the first row of isa.def that may be used. Atomic, because a test or a user may set it while another
// thread computes; every product reads it once for each kernel that it chooses, and no result depends on the choice.
struct Setting {
  std::atomic<int32_t> ceiling{0};
  std::atomic<bool> valid{true};
  char error[256] = "";

  Setting() {
    const char* wanted = std::getenv("QNB_ISA");
    if (wanted == nullptr || *wanted == '\0') return;
    const int32_t i = index_of(wanted);
    if (i >= 0) {
      ceiling = i;
      return;
    }
    valid = false;
    size_t used = 0;
    // What snprintf would have liked to write may be longer than what there is room for.
    const auto advance = [&](int length) {
      const size_t room = sizeof error - 1 - used, wrote = length < 0 ? 0 : static_cast<size_t>(length);
      used += wrote < room ? wrote : room;
    };
    advance(std::snprintf(error, sizeof error, "QNB_ISA=%.40s is no instruction set that qnb knows; use one of",
                          wanted));
    for (int32_t j = 0; j < isa_count; ++j) {
      advance(std::snprintf(error + used, sizeof error - used, "%s %s", j == 0 ? "" : ",", names[j]));
    }
  }
};

Setting& setting() {
  static Setting s;
  return s;
}

}  // namespace

bool processor_has(Isa isa) {
  static const Features has = detect();
  switch (isa) {
#define QNB_ISA(name, bit, flags, needs) \
  case isa_##name:                       \
    return needs;
#include "../isa.def"
#undef QNB_ISA
    default:
      return false;
  }
}

bool isa_allowed(Isa isa) { return isa >= setting().ceiling.load(std::memory_order_relaxed); }

bool isa_setting_valid() { return setting().valid.load(std::memory_order_relaxed); }

}  // namespace qnb

extern "C" {

int32_t qnb_isa_count(void) { return qnb::isa_count; }

const char* qnb_isa_name(int32_t i) { return i < 0 || i >= qnb::isa_count ? nullptr : qnb::names[i]; }

int32_t qnb_isa_state(int32_t i) {
  if (i < 0 || i >= qnb::isa_count) return 0;
  const auto isa = static_cast<qnb::Isa>(i);
  if (!qnb::built_for(isa)) return 0;
  return qnb::processor_has(isa) ? 2 : 1;
}

int32_t qnb_limit_isa(const char* name) {
  const int32_t i = name == nullptr ? 0 : qnb::index_of(name);
  if (i < 0) return QNB_ERROR_ISA;
  qnb::setting().ceiling = i;
  qnb::setting().valid = true;
  return QNB_OK;
}

const char* qnb_isa_error(void) { return qnb::isa_setting_valid() ? nullptr : qnb::setting().error; }

}  // extern "C"

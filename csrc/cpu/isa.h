// Which instruction sets this build, this processor and the user allow.
#pragma once

#include <cstdint>

namespace qnb {

// Rows of isa.def, best first.
enum Isa : int32_t {
#define QNB_ISA(name, bit, flags, needs) isa_##name,
#include "../isa.def"
#undef QNB_ISA
  isa_count
};

bool processor_has(Isa isa);

// Under the ceiling that QNB_ISA or qnb_limit_isa set.
bool isa_allowed(Isa isa);

// False while QNB_ISA holds an unknown name.
bool isa_setting_valid();

}  // namespace qnb

// The one place that chooses a kernel.
#pragma once

#include "isa.h"
#include "kernel.h"

namespace qnb {

struct Listed {
  const Kernel* kernel;
  Isa isa;
};

// The best kernel for the job that the processor, the ceiling and the number of rows allow. There always is one: the
// build refuses to leave out a portable kernel.
const Listed& choose(Op op, int64_t rows);

// Whether this build holds a kernel for the instruction set.
bool built_for(Isa isa);

}  // namespace qnb

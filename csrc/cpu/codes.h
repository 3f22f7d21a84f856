// What the products with packed codes check alike.
#pragma once

#include <cstdint>

#include "sizes.h"

namespace qnb {

constexpr bool is_bits(int32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

constexpr bool is_group(int64_t group, int64_t K, int64_t multiple) {
  return group >= 1 && (group % multiple == 0 || group >= K);
}

}  // namespace qnb

// Row quantization over the caller's threads.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace qnb {

// Whether each row finds its own scale or all have the given one.
enum class Rows { dynamic, fixed };

// As qnb_quantize_rows or qnb_quantize_rows_static, on checked arguments, with rows of codes ld_codes apart and zeros
// from K on.
void quantize_rows(const QuantizeRowsArgs& args, Rows rows, const qnb_parallel* parallel);

// Whether scale and zero can be a static grid's: scale positive and finite, zero an s8.
bool is_grid(float scale, int32_t zero);

}  // namespace qnb

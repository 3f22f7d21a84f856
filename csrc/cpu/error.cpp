#include "../include/qnb.h"

extern "C" const char* qnb_error_text(int32_t code) {
  switch (code) {
    case QNB_OK:
      return "no error";
    case QNB_ERROR_SIZE:
      return "a size is negative or too large to address";
    case QNB_ERROR_K:
      return "K is above 131071 (65535 with a shift), where a sum of 8-bit products can leave 32 bits: split the layer "
             "along its inputs";
    case QNB_ERROR_DTYPE:
      return "the dtype is none of float32, bfloat16, float16";
    case QNB_ERROR_NULL:
      return "a null pointer stands for memory that is not empty";
    case QNB_ERROR_WORKSPACE:
      return "the workspace is smaller than its workspace_bytes function asks for";
    case QNB_ERROR_ISA:
      return "the name of the instruction set is unknown: see qnb_isa_error, or the names of qnb_isa_name";
    case QNB_ERROR_BITS:
      return "codes have 2, 3, 4 or 8 bits";
    case QNB_ERROR_GROUP:
      return "the group is neither a multiple of 32 (of 64 for integer sums) nor at least K";
    case QNB_ERROR_CODE:
      return "a code does not fit its number of bits";
    case QNB_ERROR_GRID:
      return "the scale is not positive and finite, or the zero point lies outside -128 to 127";
    default:
      return "unknown error code";
  }
}

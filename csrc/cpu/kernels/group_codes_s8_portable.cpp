// Codes of a group to s8, and f32 totals over groups, total[m,n] (+)= f32(acc[m,n]) * scale[n].
//
// The caller guarantees what kernel.h says of DecodeS8 and AddScaled. This is the definition in plain C++.
#include "group_codes.h"

QNB_KERNEL(group_codes_s8_portable) = {
    .op = qnb::Op::group_codes, .decode_s8 = decode_s8, .add_scaled = add_scaled};

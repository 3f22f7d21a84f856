// f32, bf16 and f16, element by element, by integer arithmetic on their bits. For portable kernels only.
#pragma once

#include <cstdint>

#include "../kernel.h"

namespace {

struct F32 {
  static float load(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
  static void store(void* p, int64_t i, float v) { static_cast<float*>(p)[i] = v; }
};

uint32_t bits_of(float v) { return __builtin_bit_cast(uint32_t, v); }
float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr uint32_t infinity_bits = 0x7F800000;

// bf16 is the upper half of an f32.
struct Bf16 {
  static float load(const void* p, int64_t i) {
    return float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16);
  }
  static void store(void* p, int64_t i, float v) {
    const uint32_t bits = bits_of(v);
    const bool nan = (bits & 0x7FFFFFFF) > infinity_bits;
    // Adding just under half of the last place, or half when that place is odd, rounds half to even.
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(nan ? 0x7FC0 : rounded);
  }
};

struct F16 {
  static float load(const void* p, int64_t i) {
    const uint32_t half = static_cast<const uint16_t*>(p)[i];
    const uint32_t sign = (half & 0x8000) << 16;
    const uint32_t rest = (half & 0x7FFF) << 13;
    if (rest >= 0x0F800000) return float_of(sign | infinity_bits | (rest & 0x007FFFFF));
    // Read with f32's bias the number is 2^112 too small, denormals included; the product is exact.
    return float_of(sign | bits_of(float_of(rest) * float_of(0x77800000)));
  }
  static void store(void* p, int64_t i, float v) {
    const uint32_t bits = bits_of(v);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > infinity_bits) {
      static_cast<uint16_t*>(p)[i] = 0x7E00;
      return;
    }
    if (magnitude >= 0x477FF000) {
      half = 0x7C00;  // 65520 and more round to infinity
    } else if (magnitude < 0x38800000) {
      // Below 2^-14 halves are multiples of 2^-24. 0.5f has steps of 2^-24 there: the sum rounds to them, half to even.
      half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    } else {
      half = (magnitude - 0x38000000 + 0x0FFF + (magnitude >> 13 & 1)) >> 13;
    }
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
  }
};

// Element i of x, which is row element k, divided by divisor[k] if Divided.
template <class T, bool Divided>
float load_divided(const void* x, int64_t i, const float* divisor, int64_t k) {
  if constexpr (Divided) return T::load(x, i) / divisor[k];
  return T::load(x, i);
}

}  // namespace

// f32, bf16 and f16, sixteen at a time, with AVX-512. For avx512 kernels only. Lanes outside `mask` read as 0 and are
// not written, nor is their memory touched. Same bits as float_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../kernel.h"

namespace {

// The first `count` of sixteen lanes.
__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1); }

__mmask16 is_nan(__m512 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }

struct F32 {
  static __m512 load(const void* p, int64_t i, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  }
  static void store(void* p, int64_t i, __mmask16 mask, __m512 v) {
    _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
  }
};

struct Bf16 {
  static __m512 load(const void* p, int64_t i, __mmask16 mask) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(void* p, int64_t i, __mmask16 mask, __m512 v) {
    // Half of the last place less one, plus that place itself: round half to even.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan(v), _mm512_set1_epi32(0x7FC0));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, _mm512_cvtepi32_epi16(half));
  }
};

struct F16 {
  static __m512 load(const void* p, int64_t i, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i));
  }
  static void store(void* p, int64_t i, __mmask16 mask, __m512 v) {
    const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask,
                             _mm256_mask_mov_epi16(half, is_nan(v), _mm256_set1_epi16(0x7E00)));
  }
};

// Elements i and on of x, the first of which is row element k, divided by divisor[k] and on if Divided.
template <class T, bool Divided>
__m512 load_divided(const void* x, int64_t i, const float* divisor, int64_t k, __mmask16 mask) {
  const __m512 v = T::load(x, i, mask);
  if constexpr (!Divided) return v;
  return _mm512_maskz_div_ps(mask, v, F32::load(divisor, k, mask));
}

}  // namespace

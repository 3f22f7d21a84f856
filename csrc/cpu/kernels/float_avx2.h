// f32, bf16 and f16, eight at a time, with AVX2 and F16C. For avx2 kernels only. Elements from `count` on read as 0 and
// are not written, nor is their memory touched. Same bits as float_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../kernel.h"

namespace {

constexpr int64_t lanes = 8;

// All ones in the first `count` of eight lanes.
__m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

__m256 is_nan(__m256 v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }

struct F32 {
  static __m256 load(const void* p, int64_t i, int64_t count) {
    const float* from = static_cast<const float*>(p) + i;
    return count >= lanes ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(count));
  }
  static void store(void* p, int64_t i, int64_t count, __m256 v) {
    float* to = static_cast<float*>(p) + i;
    if (count >= lanes) {
      _mm256_storeu_ps(to, v);
    } else {
      _mm256_maskstore_ps(to, first_lanes(count), v);
    }
  }
};

// Eight 16-bit elements; AVX2 masks none that are so small.
__m128i load_halves(const void* p, int64_t i, int64_t count) {
  const uint16_t* from = static_cast<const uint16_t*>(p) + i;
  if (count >= lanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  alignas(16) uint16_t some[lanes] = {};
  for (int64_t j = 0; j < count; ++j) some[j] = from[j];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
}

void store_halves(void* p, int64_t i, int64_t count, __m128i v) {
  uint16_t* to = static_cast<uint16_t*>(p) + i;
  if (count >= lanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  alignas(16) uint16_t some[lanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(some), v);
  for (int64_t j = 0; j < count; ++j) to[j] = some[j];
}

struct Bf16 {
  static __m256 load(const void* p, int64_t i, int64_t count) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, i, count)), 16));
  }
  static void store(void* p, int64_t i, int64_t count, __m256 v) {
    // Half of the last place less one, plus that place itself: round half to even.
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0),
                                            _mm256_castps_si256(is_nan(v)));
    store_halves(p, i, count, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
};

struct F16 {
  static __m256 load(const void* p, int64_t i, int64_t count) { return _mm256_cvtph_ps(load_halves(p, i, count)); }
  static void store(void* p, int64_t i, int64_t count, __m256 v) {
    const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i nan = _mm256_castps_si256(is_nan(v));
    const __m128i nan_halves = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
    store_halves(p, i, count, _mm_blendv_epi8(half, _mm_set1_epi16(0x7E00), nan_halves));
  }
};

// Elements i and on of x, the first of which is row element k, divided by divisor[k] and on if Divided.
template <class T, bool Divided>
__m256 load_divided(const void* x, int64_t i, const float* divisor, int64_t k, int64_t count) {
  const __m256 v = T::load(x, i, count);
  if constexpr (!Divided) return v;
  const __m256 d = F32::load(divisor, k, count);
  // Lanes behind the last hold 0 and must stay so: they are divided by 1.
  return _mm256_div_ps(v, count >= lanes ? d : _mm256_blendv_ps(_mm256_set1_ps(1.0f), d,
                                                                _mm256_castsi256_ps(first_lanes(count))));
}

}  // namespace

// Vectors of floats, and bfloat16 in memory, for CPUs with AVX-512 and its BF16 instructions.
//
// Included behind `#pragma GCC target`; what is here is each file's own.
#pragma once

#include "portable.h"

namespace vitrail {
namespace {

constexpr int64_t kLanes = 16;  // of 32 bits

inline __m512 load(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(bf16* to, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

// 2^x for x up to about 127, within 3e-6 of itself; below the smallest number zero, of NaN NaN.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);  // powers of ln 2 over factorials
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.61812911e-3f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.55041087e-2f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.40226507e-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.93147181e-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

}  // namespace
}  // namespace vitrail

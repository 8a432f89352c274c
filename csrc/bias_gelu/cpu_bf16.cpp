// A bias and GELU for CPUs with AVX-512 and its BF16 instructions, in one pass over memory.
//
// What comes from elsewhere is included before the pragma: its inline functions may be shared with the other files.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gelu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4,avx512bf16")
#include "../avx512_bf16.h"

namespace vitrail {
namespace {

// The normal distribution at x: its cumulative distribution to 1e-6, and e^(-x^2 / 2).
struct Normal {
  __m512 cumulative, bell;

  // Abramowitz and Stegun 7.1.26, which has the bell as a factor.
  explicit Normal(__m512 x) {
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(30.0f), _mm512_abs_ps(x));  // NaN stays: it is the second operand
    bell = exp2(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-0.72134752f)));
    const __m512 d = _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), _mm512_set1_ps(1.0f));
    __m512 t = _mm512_rcp14_ps(d);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2.0f)));
    __m512 sum = _mm512_set1_ps(0.5f * 1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * -1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * 1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * -0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * 0.254829592f));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(sum, t), bell);
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    cumulative = _mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(1.0f), tail);
  }
};

}  // namespace

void bias_gelu_forward(const GeluCall& call) {
  torch::stable::parallel_for(0, call.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < call.columns; c += kLanes) {
        const int64_t place = row * call.columns + c;
        const __m512 x = _mm512_add_ps(load(call.x + place), _mm512_loadu_ps(call.bias + c));
        store(call.out + place, _mm512_mul_ps(x, Normal(x).cumulative));
      }
  });
}

void bias_gelu_backward(const GeluCall& call) {
  torch::stable::parallel_for(0, call.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const sums = call.bias_parts + part * call.columns;
      std::fill_n(sums, call.columns, 0.0f);
      for (int64_t row = call.first_row(part); row < call.first_row(part + 1); ++row)
        for (int64_t c = 0; c < call.columns; c += kLanes) {
          const int64_t place = row * call.columns + c;
          const __m512 x = _mm512_add_ps(load(call.x + place), _mm512_loadu_ps(call.bias + c));
          const Normal normal(x);
          const __m512 density = _mm512_mul_ps(normal.bell, _mm512_set1_ps(0.39894228f));
          const __m512 slope = _mm512_fmadd_ps(x, density, normal.cumulative);
          const __m512 grad = _mm512_mul_ps(load(call.grad + place), slope);
          store(call.grad_x + place, grad);
          _mm512_storeu_ps(sums + c, _mm512_add_ps(_mm512_loadu_ps(sums + c), grad));
        }
    }
  });
}

}  // namespace vitrail
#endif

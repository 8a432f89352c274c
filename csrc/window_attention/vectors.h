// Vectors of floats of one level of instructions, and products of small matrices made of them.
#pragma once

#include "../portable.h"

namespace vitrail {
namespace VITRAIL_LEVEL {

#if VITRAIL_LANES == 16

using Vector = __m512;
constexpr int kColumns = 4;  // vectors of a block of a product: with kRows of them, accumulators fill the registers

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector load(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector mul_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector sub_mul(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vector power_of_two(Vector rounded) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(rounded), 23));
}
inline Vector zero_below(Vector limit, Vector x, Vector value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), value);
}

inline float sum_of(Vector value) { return _mm512_reduce_add_ps(value); }
inline float largest_of(Vector value) { return _mm512_reduce_max_ps(value); }

#else

using Vector = __m256;
constexpr int kColumns = 2;

inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector load(const bf16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector mul_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector sub_mul(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector power_of_two(Vector rounded) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(rounded), 23));
}
inline Vector zero_below(Vector limit, Vector x, Vector value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), value);
}
inline float sum_of(Vector value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest_of(Vector value) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

#endif

constexpr int kLanes = VITRAIL_LANES;
constexpr int kRows = 6;  // rows of a block of a product

// e^x for x up to about 80, to a rounding or two: below the smallest normal number zero, of NaN NaN.
inline Vector exponential(Vector x) {
  const Vector lowest = broadcast(-87.0f);
  const Vector y = max(lowest, x);  // NaN stays: it is the second operand
  // Adding 1.5 * 2^23 + 127 leaves the nearest integer, biased as an exponent, in the low bits.
  const Vector shifter = broadcast(12582912.0f + 127.0f);
  const Vector rounded = mul_add(y, broadcast(1.44269504f), shifter);
  const Vector n = sub(rounded, shifter);
  Vector r = sub_mul(n, broadcast(0.693145752f), y);  // ln 2 in two parts, the first with few bits
  r = sub_mul(n, broadcast(1.42860677e-6f), r);
  Vector sum = broadcast(1.0f / 5040);
  sum = mul_add(sum, r, broadcast(1.0f / 720));
  sum = mul_add(sum, r, broadcast(1.0f / 120));
  sum = mul_add(sum, r, broadcast(1.0f / 24));
  sum = mul_add(sum, r, broadcast(1.0f / 6));
  sum = mul_add(sum, r, broadcast(0.5f));
  sum = mul_add(sum, r, broadcast(1.0f));
  sum = mul_add(sum, r, broadcast(1.0f));
  return zero_below(lowest, x, mul(sum, power_of_two(rounded)));
}

// A factor of a product: element (i, k) lies at data[i row + k column].
struct Factor {
  const float* data;
  int64_t row, column;
};

template <int kM, int kN>
void block_product(const Factor& a, const float* b, int64_t b_row, int64_t depth, const float* first, int64_t first_row,
                   float* c, int64_t c_row) {
  Vector sums[kM][kN];
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) sums[m][n] = broadcast(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kN];
    for (int n = 0; n < kN; ++n) right[n] = load(b + k * b_row + n * kLanes);
    for (int m = 0; m < kM; ++m) {
      const Vector left = broadcast(a.data[m * a.row + k * a.column]);
      for (int n = 0; n < kN; ++n) sums[m][n] = mul_add(left, right[n], sums[m][n]);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      // Last: sums that began with a large number would round each term to what that one leaves.
      if (first) sums[m][n] = add(sums[m][n], load(first + m * first_row + n * kLanes));
      store(c + m * c_row + n * kLanes, sums[m][n]);
    }
}

template <int kN>
void rows_product(int64_t rows, const Factor& a, const float* b, int64_t b_row, int64_t depth, const float* first,
                  int64_t first_row, float* c, int64_t c_row) {
  Factor part = a;
  int64_t done = 0;
  const auto take = [&](auto count) {
    constexpr int kM = decltype(count)::value;
    part.data = a.data + done * a.row;
    block_product<kM, kN>(part, b, b_row, depth, first ? first + done * first_row : nullptr, first_row,
                          c + done * c_row, c_row);
    done += kM;
  };
  while (rows - done >= kRows) take(std::integral_constant<int, kRows>());
  switch (rows - done) {
    case 5: take(std::integral_constant<int, 5>()); break;
    case 4: take(std::integral_constant<int, 4>()); break;
    case 3: take(std::integral_constant<int, 3>()); break;
    case 2: take(std::integral_constant<int, 2>()); break;
    case 1: take(std::integral_constant<int, 1>()); break;
    default: break;
  }
}

// c = first + a b, or a b without `first`: [rows, columns] of depth `depth`; b and c are row-major, columns are a
// multiple of kLanes.
inline void product(int64_t rows, int64_t columns, int64_t depth, const Factor& a, const float* b, int64_t b_row,
                    const float* first, int64_t first_row, float* c, int64_t c_row) {
  for (int64_t column = 0; column < columns;) {
    const int64_t left = (columns - column) / kLanes;
    const float* const from = first ? first + column : nullptr;
    const auto take = [&](auto count) {
      constexpr int kN = decltype(count)::value;
      rows_product<kN>(rows, a, b + column, b_row, depth, from, first_row, c + column, c_row);
      column += kN * kLanes;
    };
    if (left >= kColumns) {
      take(std::integral_constant<int, kColumns>());
    } else if (left == 3) {
      take(std::integral_constant<int, 3>());
    } else if (left == 2) {
      take(std::integral_constant<int, 2>());
    } else {
      take(std::integral_constant<int, 1>());
    }
  }
}

// Eight rows of eight floats, transposed.
inline void transpose8(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 row[8], pair[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; j += 8) transpose8(from + i * columns + j, columns, to + j * to_row + i, to_row);
}

}  // namespace VITRAIL_LEVEL
}  // namespace vitrail

// Arithmetic that the host and the device do alike.
//
// Everything is compiled without contraction (-ffp-contract=off, -fmad=false): a multiply-add is fused where `fma` says
// so and nowhere else, so that a test on the CPU speaks for the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VITRAIL_HD __host__ __device__ __forceinline__
#else
#define VITRAIL_HD inline __attribute__((always_inline))
#endif

namespace vitrail {

struct bf16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

template <class To, class From>
VITRAIL_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

VITRAIL_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

VITRAIL_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// Linear interpolation as torch.lerp computes it: exact at both ends.
VITRAIL_HD float lerp(float from, float to, float weight) {
  return weight < 0.5f ? fma(weight, to - from, from) : fma(weight - 1.0f, to - from, to);
}

VITRAIL_HD float to_float(float value) { return value; }

VITRAIL_HD float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

template <class T>
VITRAIL_HD T from_float(float value);

template <>
VITRAIL_HD float from_float<float>(float value) {
  return value;
}

// Rounds to nearest, ties to even; a NaN stays one.
template <>
VITRAIL_HD bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(value != value ? 0x7FC0 : rounded)};
#endif
}

template <>
VITRAIL_HD half from_float<half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t result;
  if (magnitude > 0x7F800000) {
    result = 0x7E00;  // NaN
  } else if (magnitude >= 0x477FF000) {
    result = 0x7C00;  // rounds to infinity
  } else if (magnitude >= 0x38800000) {  // normal: move the exponent's bias from 127 to 15 and round away 13 bits
    result = (magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 0.5 leaves units of 2^-24 in the low bits, rounded by the addition itself
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  }
  return {uint16_t(sign | result)};
#endif
}

}  // namespace vitrail

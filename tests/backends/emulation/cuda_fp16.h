#pragma once

#include "cuda_runtime.h"

using __half = uint16_t;

inline __half __ushort_as_half(uint16_t bits) { return bits; }

inline float __half2float(__half bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t widened = exponent == 31 ? 255 : exponent + 112;
  return __uint_as_float(sign | widened << 23 | fraction << 13);
}

inline uint16_t __half_as_ushort(__half half) { return half; }

// To nearest, ties to even: of the floats between two halves the sum with 1.5 times the last bit's
// weight and 2^23 is the rounded one.
inline __half __float2half_rn(float value) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(std::max(magnitude, 0x1p-14f), &exponent);  // of a multiple of 2^(exponent - 11)
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  // 1024 steps and more have an implied bit, which carries into the exponent where they are 2048.
  return static_cast<uint16_t>(sign | (steps + (uint32_t(exponent + 13) << 10)));
}

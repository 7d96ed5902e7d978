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

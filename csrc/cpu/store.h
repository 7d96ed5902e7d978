// Registers of float back into memory, rounded to nearest, ties to even, where they are half types.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(BFloat16* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  // Signed: SSE2 compares no other words.
  const auto nan = reinterpret_cast<Words>(
      reinterpret_cast<Sum<float>::Integers>(bits & 0x7fffffffu) > 0x7f800000);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words quiet = bits >> 16 | 0x40u;
  const HalfBits half = __builtin_convertvector((rounded & ~nan) | (quiet & nan), HalfBits);
  std::memcpy(p, &half, sizeof(half));
}

// The 16 bits of a half; where a processor has an instruction for it, that is used instead.
inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half is a multiple of 2^-24, which is the last bit of a float from ½ on.
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, sizeof(magnitude));
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

inline void store(Half* p, Floats v) {
#if defined(__AVX512F__)
  const __m256i half =
      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const float16x4_t half = vcvt_f16_f32(v);
#else
  HalfBits half;
  for (int i = 0; i < Sum<float>::kWidth; ++i) half[i] = half_bits(v[i]);
#endif
  std::memcpy(p, &half, sizeof(half));
}

// The first n lanes only.
template <typename T>
inline void store_first(T* p, typename Sum<T>::Vector v, int64_t n) {
  if (n >= Sum<T>::kWidth) return store(p, v);
  T padded[Sum<T>::kWidth];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

}  // namespace TK_ISA
}  // namespace tk

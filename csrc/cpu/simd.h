// Sixteen floats (or doubles) at a time, in plain GCC/Clang vector extensions: the compiler splits
// them to the width of the instruction set this file is compiled for, so the order of every sum,
// and with it the result, depends on that set only through fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace tk {
inline namespace TK_ISA {

constexpr int kLanes = 16;

// Storage types of the half formats; a kernel only ever sees them widened.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

using Float16x = float __attribute__((vector_size(kLanes * sizeof(float))));
using Double16x = double __attribute__((vector_size(kLanes * sizeof(double))));
using Word16x = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Short16x = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using Mask16x = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <typename T>
struct ElementType {
  using type = T;
};

// Calls use(ElementType<T>()) for the type T that elements of this dtype are stored as.
template <class Use>
void with_element_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::f32:
      return use(ElementType<float>());
    case DType::f16:
      return use(ElementType<Half>());
    case DType::bf16:
      return use(ElementType<BFloat16>());
    case DType::f64:
      return use(ElementType<double>());
  }
}

// What a storage type is summed in.
template <typename T>
struct Sum {
  using Scalar = float;
  using Vector = Float16x;
};
template <>
struct Sum<double> {
  using Scalar = double;
  using Vector = Double16x;
};

inline Float16x load(const float* p) {
  Float16x v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Double16x load(const double* p) {
  Double16x v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Float16x load(const BFloat16* p) {
  Short16x bits;
  std::memcpy(&bits, p, sizeof(bits));
  Word16x wide = __builtin_convertvector(bits, Word16x) << 16;
  Float16x v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

inline Float16x load(const Half* p) {
  Float16x v;
#if defined(__AVX512F__)
  // The masked form: GCC 12 warns of an undefined source operand in the plain one.
  __m512 wide =
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  std::memcpy(&v, &wide, sizeof(v));
#elif defined(__F16C__)
  __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  std::memcpy(&v, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
#else
  // Move the 15 low bits to float's place and rescale the exponent by 2^112; the product is exact,
  // subnormals included. An exponent of 31 (Inf, NaN) must become 255.
  Short16x half;
  std::memcpy(&half, p, sizeof(half));
  Word16x bits = __builtin_convertvector(half, Word16x);
  Word16x magnitude = (bits & 0x7fffu) << 13;
  Float16x scaled;
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  Word16x result;
  std::memcpy(&result, &scaled, sizeof(result));
  Word16x special = Word16x((bits & 0x7c00u) == 0x7c00u);
  result |= (special & 0x7f800000u) | (bits & 0x8000u) << 16;
  std::memcpy(&v, &result, sizeof(v));
#endif
  return v;
}

// The first n < 16 elements, the other lanes 0: a term of 0 leaves every moment as it is.
template <typename T>
inline typename Sum<T>::Vector load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

// The first n lanes, the others 0, whatever they held.
inline Float16x keep_first(Float16x v, int64_t n) {
  const Mask16x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Mask16x keep = lane < static_cast<int32_t>(n);
  Mask16x bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits &= keep;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline Double16x keep_first(Double16x v, int64_t n) {
  for (int i = 0; i < kLanes; ++i) v[i] = i < n ? v[i] : 0;
  return v;
}

// The first n < 16 elements where `readable` may be read from p: past the end of a row there mostly
// is another, and one load with a mask is several times as fast as a copy of n elements.
template <typename T>
inline typename Sum<T>::Vector load_first(const T* p, int64_t n, int64_t readable) {
  return readable < kLanes ? load_first(p, n) : keep_first(load(p), n);
}

inline Float16x abs(Float16x v) {
  Word16x bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits &= 0x7fffffffu;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline Double16x abs(Double16x v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_fabs(v[i]);
  return v;
}

// Lanes whose bit is set, lane 0 the lowest, with the other sign.
inline Float16x negate(Float16x v, uint32_t bits) {
  const Word16x lane = {1,   2,   4,    8,    16,   32,   64,    128,
                        256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const Word16x flip = Word16x((bits & lane) != 0) & 0x80000000u;
  Word16x words;
  std::memcpy(&words, &v, sizeof(v));
  words ^= flip;
  std::memcpy(&v, &words, sizeof(v));
  return v;
}

inline Double16x negate(Double16x v, uint32_t bits) {
  for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1 ? -v[i] : v[i];
  return v;
}

template <typename V>
inline V splat(double x) {
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
}

// A fixed tree: lane i with i+8, then +4, +2, +1.
template <typename V>
inline double sum_lanes(V v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  return (v[0] + v[2]) + (v[1] + v[3]);
}

}  // namespace TK_ISA
}  // namespace tk

// Loads and arithmetic of registers (element_types.h).
//
// Sums have sixteen lanes on every set: element i of a run goes to lane i % 16, whatever the number
// of registers that sixteen lanes take (lanes.h). So the order of a sum depends on the shape alone,
// and sets that fuse a multiplication and an addition give the same bits: AVX2, AVX-512 and NEON.
// The baseline of x86-64 rounds the product too. CMakeLists.txt forbids the compiler to fuse on its
// own; multiply_add() does.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/element_types.h"

namespace tk {
inline namespace TK_ISA {

// Elements ahead that loops along memory ask for: with AVX-512 the processor's own prefetching
// leaves a sixth to a quarter of the time of a read to be waited for. What lies behind the end of a
// tensor may be asked for: a prefetch reads nothing that the program sees, and cannot fail.
constexpr int64_t kAhead = 512;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Doubles load(const double* p) {
  Doubles v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// A register's worth of a half type.
#if defined(__AVX512F__)
using Packed = __m256i;
// The masked forms: GCC 12 warns of an undefined source operand in the plain ones.
inline Floats widened(Packed bits, BFloat16) {
  const auto wide = reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bits));
  return reinterpret_cast<Floats>(wide << 16);
}
inline Floats widened(Packed bits, Half) { return _mm512_maskz_cvtph_ps(0xffff, bits); }
#elif defined(__AVX2__)
using Packed = __m128i;
inline Floats widened(Packed bits, BFloat16) {
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(_mm256_cvtepu16_epi32(bits)) << 16);
}
inline Floats widened(Packed bits, Half) { return _mm256_cvtph_ps(bits); }
#endif

inline Floats load(const BFloat16* p) {
  // One instruction, where to widen and to shift are two; AVX2 and AVX-512 have none. Of
  // __builtin_convertvector GCC 12 makes four there that widen, in halves of a register.
#if defined(__AVX2__)
  Packed bits;
  std::memcpy(&bits, p, sizeof(bits));
  return widened(bits, BFloat16());
#elif defined(__SSE2__)
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Floats>(_mm_unpacklo_epi16(_mm_setzero_si128(), low));
#elif defined(__aarch64__)
  uint16x4_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
#else
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline Floats load(const Half* p) {
#if defined(__AVX2__)
  Packed bits;
  std::memcpy(&bits, p, sizeof(bits));
  return widened(bits, Half());
#elif defined(__aarch64__)
  float16x4_t half;
  std::memcpy(&half, p, sizeof(half));
  return vcvt_f32_f16(half);
#else
  // Move the 15 low bits to float's place and rescale the exponent by 2^112; the product is exact,
  // subnormals included. An exponent of 31 (Inf, NaN) must become 255.
  HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  const Words bits = __builtin_convertvector(half, Words);
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words scaled = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 0x1p112f);
  // Signed: SSE2 compares no other words.
  const auto special =
      reinterpret_cast<Words>(reinterpret_cast<Sum<float>::Integers>(magnitude) > 0x0f7fffff);
  return reinterpret_cast<Floats>(scaled | (special & 0x7f800000u) | (bits & 0x8000u) << 16);
#endif
}

// 0, 1, 2, ...
template <typename S>
inline typename Sum<S>::Integers lane_numbers() {
  typename Sum<S>::Integers lane{};
  for (int i = 0; i < Sum<S>::kWidth; ++i) lane[i] = i;
  return lane;
}

// The first n lanes, the others 0, whatever they held. n may be negative, or beyond the last.
template <typename V>
inline V keep_first(V v, int64_t n) {
  using S = SumOf<V>;
  using I = typename S::Integers;
  const auto first = static_cast<decltype(I{}[0] + I{}[0])>(n);
  return reinterpret_cast<V>(reinterpret_cast<I>(v) & (lane_numbers<typename S::Scalar>() < first));
}

#if defined(__AVX2__)
// The first n elements of a register, 0 < n < its width, the other lanes 0. From p on, `readable`
// elements may be read: past the end of a row there mostly is another, and one load with a mask is
// several times as fast as a copy of n elements.
template <typename T>
inline typename Sum<T>::Vector load_part(const T* p, int64_t n, int64_t readable) {
  constexpr int kWidth = Sum<T>::kWidth;
  if (readable >= kWidth) return keep_first(load(p), n);
  T padded[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

// Where the instruction set can leave out the other lanes of a load, nothing is read past them.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Floats load_part(const float* p, int64_t n, int64_t) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline Doubles load_part(const double* p, int64_t n, int64_t) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
}
inline Floats load_part(const BFloat16* p, int64_t n, int64_t) {
  return widened(_mm256_maskz_loadu_epi16(first_lanes(n), p), BFloat16());
}
inline Floats load_part(const Half* p, int64_t n, int64_t) {
  return widened(_mm256_maskz_loadu_epi16(first_lanes(n), p), Half());
}
#elif defined(__AVX2__)
inline Floats load_part(const float* p, int64_t n, int64_t) {
  const auto first = lane_numbers<float>() < static_cast<int32_t>(n);
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first));
}
inline Doubles load_part(const double* p, int64_t n, int64_t) {
  return _mm256_maskload_pd(p, reinterpret_cast<__m256i>(lane_numbers<double>() < n));
}
#endif

// The first n elements of a register: a term of 0 leaves every sum as it is. n may be negative, or
// beyond the last.
template <typename T>
inline typename Sum<T>::Vector load_first(const T* p, int64_t n, int64_t readable) {
  if (n <= 0) return typename Sum<T>::Vector{};
  if (n >= Sum<T>::kWidth) return load(p);
  return load_part(p, n, readable);
}
#else
// The first n elements of a register, the other lanes 0: a term of 0 leaves every sum as it is. n
// may be negative, or beyond the last. From p on, `readable` elements may be read: past the end of
// a row there mostly is another, and one load with a mask is several times as fast as a copy of n
// elements.
template <typename T>
inline typename Sum<T>::Vector load_first(const T* p, int64_t n, int64_t readable) {
  constexpr int kWidth = Sum<T>::kWidth;
  if (n <= 0) return typename Sum<T>::Vector{};
  if (n >= kWidth) return load(p);
  if (readable >= kWidth) return keep_first(load(p), n);
  T padded[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
#endif

template <typename V>
inline V abs(V v) {
  using I = typename SumOf<V>::Integers;
  return reinterpret_cast<V>(reinterpret_cast<I>(v) & ~SumOf<V>::kSign);
}

// Lanes whose bit is set, lane 0 the lowest, with the other sign.
template <typename V>
inline V negate(V v, uint32_t bits) {
  using S = SumOf<V>;
  using I = typename S::Integers;
  const I lane = lane_numbers<typename S::Scalar>();
  const I word = static_cast<decltype(I{}[0] + I{}[0])>(bits) - I{};
#if defined(__AVX2__) || defined(__aarch64__)
  const I flip = (word << (static_cast<int>(8 * sizeof(I{}[0])) - 1 - lane)) & S::kSign;
#else
  const I bit = (I{} + 1) << lane;  // a constant: SSE2 shifts all lanes alike
  const I flip = ((word & bit) == bit) & S::kSign;
#endif
  return reinterpret_cast<V>(reinterpret_cast<I>(v) ^ flip);
}

// a·b + c, rounded once where the instruction set can.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

template <typename V>
inline V splat(double x) {
  return static_cast<typename SumOf<V>::Scalar>(x) - V{};
}

}  // namespace TK_ISA
}  // namespace tk

// exp, tanh, the square root and a choice, for vectors of floats and of doubles.
//
// exp(x) = 2^n · e^r with n = ⌊x / ln 2⌉ and r = x − n·ln 2 in two parts, |r| ≤ 0.347; e^r is 1 + r
// + r²·P(r), P of degree 4. tanh(x) is x + x³·Q(x²) where |x| < 5/8, Q of degree 4, and else
// 1 − 2/(exp(2|x|) + 1) with the sign of x. P and Q were fitted for least relative error
// (tools/elementary.py). Against float64, over all floats, exp is off by at most 1.01 units in the
// last place with fused products and 0.99 without, and tanh by at most 1.34 (measured by
// tests/methods/test_elementary.py); an exp below 2^-126 is 0. NaN and infinities go through as
// those of the standard library do. Doubles take its functions lane by lane: they are for
// references, not speed.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Lanes of a where the comparison held, else those of b.
template <typename Mask, typename V>
inline V choose(Mask mask, V a, V b) {
  return mask ? a : b;
}

inline Floats square_root(Floats v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__aarch64__)
  return vsqrtq_f32(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#else
  for (int i = 0; i < Sum<float>::kWidth; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

inline Floats exponential(Floats x) {
  using I = Sum<float>::Integers;
  // Beyond these the result is infinite, or below the normal numbers.
  const Floats high = splat<Floats>(88.72283935546875), low = splat<Floats>(-87.336544);
  Floats bounded = choose(x > high, high, x);
  bounded = choose(bounded < low, low, bounded);  // a NaN stays
  // Adding 1.5·2^23 rounds to an integer, which then stands in the lowest bits.
  const Floats magic = splat<Floats>(12582912.0);
  const Floats shifted = multiply_add(bounded, splat<Floats>(1.44269504088896341), magic);
  const Floats n = shifted - magic;
  Floats r = multiply_add(n, splat<Floats>(-0.693359375), bounded);
  r = multiply_add(n, splat<Floats>(2.12194440054690583e-4), r);
  Floats p = splat<Floats>(0.00138146023);
  p = multiply_add(p, r, splat<Floats>(0.00836871564));
  p = multiply_add(p, r, splat<Floats>(0.041668389));
  p = multiply_add(p, r, splat<Floats>(0.166665211));
  p = multiply_add(p, r, splat<Floats>(0.49999994));
  const Floats e = multiply_add(p, r * r, r) + splat<Floats>(1);
  // 2^n in two factors: n reaches 128.
  const I whole = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  const I half = whole >> 1;
  const auto power = [](I exponent) { return reinterpret_cast<Floats>((exponent + 127) << 23); };
  const Floats result = e * power(half) * power(whole - half);
  const Floats above = choose(x > high, splat<Floats>(INFINITY), result);
  return choose(x < low, Floats{}, above);
}

inline Floats hyperbolic_tangent(Floats x) {
  using I = Sum<float>::Integers;
  const Floats size = abs(x), square = x * x;
  Floats q = splat<Floats>(-0.0057049864);
  q = multiply_add(q, square, splat<Floats>(0.0206390861));
  q = multiply_add(q, square, splat<Floats>(-0.0537397154));
  q = multiply_add(q, square, splat<Floats>(0.133314416));
  q = multiply_add(q, square, splat<Floats>(-0.333332807));
  const Floats inner = multiply_add(q * square, size, size);
  const Floats e = exponential(size + size);
  const Floats outer = splat<Floats>(1) - splat<Floats>(2) / (e + splat<Floats>(1));
  const Floats result = choose(size < splat<Floats>(0.625), inner, outer);
  const I sign = reinterpret_cast<I>(x) & Sum<float>::kSign;
  return reinterpret_cast<Floats>(reinterpret_cast<I>(result) | sign);
}

#define TK_BY_LANES(name, function)                                      \
  inline Doubles name(Doubles v) {                                       \
    for (int i = 0; i < Sum<double>::kWidth; ++i) v[i] = function(v[i]); \
    return v;                                                            \
  }
TK_BY_LANES(square_root, std::sqrt)
TK_BY_LANES(exponential, std::exp)
TK_BY_LANES(hyperbolic_tangent, std::tanh)
#undef TK_BY_LANES

}  // namespace TK_ISA
}  // namespace tk

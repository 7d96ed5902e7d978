// Keys of scores, a register at a time (common/global_threshold.h).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <utility>

#include "common/global_threshold.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

constexpr int kKeyLanes = Sum<float>::kWidth;
using KeyBits = Sum<float>::Integers;  // signed: SSE2 compares no other words

// A bit for each lane whose highest bit is set, that of lane 0 the lowest.
inline uint32_t set_lanes(KeyBits lanes) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(lanes), _mm512_setzero_si512());
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(lanes));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kKeyLanes; ++i) bits |= static_cast<uint32_t>(lanes[i] < 0) << i;
  return bits;
#endif
}

// A double as a float that is infinite only where the double is.
inline float narrowed(double value) {
  if (std::isfinite(value)) value = std::clamp<double>(value, -FLT_MAX, FLT_MAX);
  return static_cast<float>(value);
}

// The scores of the elements from i on, of which n are there; the other lanes hold anything.
template <typename T>
inline Floats scores(const T* a, const T* b, int64_t n) {
  if constexpr (Sum<T>::kWidth == kKeyLanes) {
    const Floats values = load_first(a, n, n);
    return b ? load_first(b, n, n) * values : values;
  } else {
    Floats values{};
    for (int i = 0; i < std::min<int64_t>(n, kKeyLanes); ++i)
      values[i] = narrowed(b ? b[i] * a[i] : a[i]);
    return values;
  }
}

inline KeyBits magnitudes(Floats scores) { return reinterpret_cast<KeyBits>(scores) & 0x7fffffff; }

template <bool kSigned>
inline KeyBits keys(Floats scores) {
  if constexpr (!kSigned) return magnitudes(scores);
  const KeyBits bits = reinterpret_cast<KeyBits>(scores + 0.0f);  // -0 becomes 0
  return bits ^ (bits >> 31 | INT32_MIN);
}

// Calls use(scores, n) for each register of an item's elements, n of its lanes.
template <class Use>
void for_scores(const ScoreItem& item, int64_t begin, int64_t end, const Use& use) {
  with_element_type(item.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const T* a = static_cast<const T*>(item.a);
    const T* b = static_cast<const T*>(item.b);
    if (!item.ranked && b) a = std::exchange(b, nullptr);
    for (int64_t i = begin; i < end; i += kKeyLanes) {
      __builtin_prefetch(a + i + kAhead);
      if (b) __builtin_prefetch(b + i + kAhead);
      use(scores(a + i, b ? b + i : nullptr, end - i), std::min<int64_t>(end - i, kKeyLanes));
    }
  });
}

}  // namespace TK_ISA
}  // namespace tk

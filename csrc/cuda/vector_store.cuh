// Elements that a kernel reads and writes in place: vectors of them, and floats rounded to nearest.
#pragma once

#include "cuda/vector_load.cuh"

namespace tk {

template <class E>
__device__ typename E::Raw narrow(float value) {
  if constexpr (E::kType == DType::f32) {
    return __float_as_uint(value);
  } else if constexpr (E::kType == DType::f16) {
    return __half_as_ushort(__float2half_rn(value));
  } else {
    const uint32_t bits = __float_as_uint(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? bits >> 16 | 0x40
                                     : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// N elements from `from` on, which this thread may change: no read-only cache in between.
template <class E, int N>
__device__ void load_own(Vector<E, N>& to, const typename E::Raw* from, bool aligned) {
  static_assert(N > 1);
  if (aligned) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(from);
    to.words[0] = loaded.x;
    to.words[1] = loaded.y;
    to.words[2] = loaded.z;
    to.words[3] = loaded.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr int kEach = Vector<E, N>::kPerWord;
      to.words[i] = from[i * kEach];
      if constexpr (kEach == 2) to.words[i] |= uint32_t{from[2 * i + 1]} << 16;
    }
  }
}

template <class E, int N>
__device__ void store(typename E::Raw* to, const float (&values)[N], bool aligned) {
  constexpr int kEach = Vector<E, N>::kPerWord;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = narrow<E>(values[i]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = narrow<E>(values[i * kEach]);
    if constexpr (kEach == 2) words[i] |= uint32_t{narrow<E>(values[2 * i + 1])} << 16;
  }
  *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

}  // namespace tk

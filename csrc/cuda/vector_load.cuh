// Elements from device memory, widened to float as soon as they are read.
//
// A Vector is 16 bytes of consecutive elements: one load where the address allows it, else element
// by element. Both fill the same registers, so alignment never changes a result's bits.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <utility>

#include "common/dtype.h"
#include "common/host_device.h"

namespace tk {

constexpr int kVectorBytes = 16;

template <DType>
struct Element;

template <>
struct Element<DType::f32> {
  static constexpr DType kType = DType::f32;
  using Raw = uint32_t;
  static __device__ float widen(Raw bits) { return __uint_as_float(bits); }
};

template <>
struct Element<DType::f16> {
  static constexpr DType kType = DType::f16;
  using Raw = uint16_t;
  static __device__ float widen(Raw bits) { return __half2float(__ushort_as_half(bits)); }
};

template <>
struct Element<DType::bf16> {  // the upper half of a float
  static constexpr DType kType = DType::bf16;
  using Raw = uint16_t;
  static __device__ float widen(Raw bits) { return __uint_as_float(uint32_t{bits} << 16); }
};

// Calls use(Element<dtype>()), on the host or the device as the caller. There is no f64 here.
#pragma nv_exec_check_disable
template <class Use>
TK_HOST_DEVICE void with_element(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::f32:
      return use(Element<DType::f32>());
    case DType::f16:
      return use(Element<DType::f16>());
    default:
      return use(Element<DType::bf16>());
  }
}

template <class E>
constexpr int kVectorSize = kVectorBytes / int{sizeof(typename E::Raw)};

template <class E>
__device__ float load_element(const void* base, int64_t at) {
  return E::widen(__ldg(static_cast<const typename E::Raw*>(base) + at));
}

// N elements of type E in registers: a whole 16-byte vector, or a single element.
template <class E, int N>
struct Vector {
  static_assert(N == 1 || N == kVectorSize<E>);
  static constexpr int kPerWord = N == 1 ? 1 : 4 / int{sizeof(typename E::Raw)};
  static constexpr int kWords = N / kPerWord;

  uint32_t words[kWords];

  __device__ float operator[](int i) const {
    const uint32_t word = words[i / kPerWord];
    return E::widen(static_cast<typename E::Raw>(i % kPerWord ? word >> 16 : word));
  }

  __device__ void clear() {
    for (uint32_t& word : words) word = 0;
  }

  __device__ void load_aligned(const typename E::Raw* from) {
    if constexpr (N == 1) {
      words[0] = __ldg(from);
    } else {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
      words[0] = loaded.x;
      words[1] = loaded.y;
      words[2] = loaded.z;
      words[3] = loaded.w;
    }
  }

  __device__ void load_elements(const typename E::Raw* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = __ldg(from + i * kPerWord);
      if constexpr (kPerWord == 2) words[i] |= uint32_t{__ldg(from + 2 * i + 1)} << 16;
    }
  }
};

// `Count` vectors of each tensor T, `stride` elements apart; those from `limit` elements on are
// zero. The branches enclose all loads, so that they are in flight together.
template <class E, int N, int Count, size_t... T>
__device__ void load_vectors(Vector<E, N> (&to)[Count][sizeof...(T)],
                             const typename E::Raw* const (&from)[sizeof...(T)], int64_t stride,
                             int64_t limit, bool aligned, std::index_sequence<T...>) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      (to[i][T].clear(), ...);
      if (i * stride < limit) (to[i][T].load_aligned(from[T] + i * stride), ...);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      (to[i][T].clear(), ...);
      if (i * stride < limit) (to[i][T].load_elements(from[T] + i * stride), ...);
    }
  }
}

}  // namespace tk

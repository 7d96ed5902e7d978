// Elements as they are stored, and the registers that they are summed in, in GCC's and Clang's
// vector extensions: as wide as the registers of the instruction set that this file is compiled
// for. Of wider ones the compiler keeps nothing in registers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tk {
inline namespace TK_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif
constexpr int kLanes = 16;

// Storage types of the half formats; a kernel only ever sees them widened.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

// What a storage type is summed in: the scalar, a register of it, integers of the same size.
template <typename T>
struct Sum {
  using Scalar = float;
  static constexpr int kWidth = kRegisterBytes / sizeof(float);
  typedef float Vector __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t Integers __attribute__((vector_size(kRegisterBytes)));
  static constexpr int32_t kSign = INT32_MIN;
};
template <>
struct Sum<double> {
  using Scalar = double;
  static constexpr int kWidth = kRegisterBytes / sizeof(double);
  typedef double Vector __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t Integers __attribute__((vector_size(kRegisterBytes)));
  static constexpr int64_t kSign = INT64_MIN;
};

using Floats = Sum<float>::Vector;
using Doubles = Sum<double>::Vector;

// Sum<> of the scalar that a vector holds.
template <typename V>
using SumOf = Sum<decltype(V{}[0] + V{}[0])>;

// The bits of a register of halves, and of one of floats.
typedef uint16_t HalfBits __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));

}  // namespace TK_ISA
}  // namespace tk

// csrc/cuda/ptx.cuh for a CPU. A warp's lanes hand over their registers; which element of a
// matrix a register holds is written down here once more, from the PTX manual's sections on mma and
// ldmatrix.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>

namespace tk {

inline void let_next_kernel_begin() {}
inline void wait_for_last_kernel() { emulation::wait_for_last_kernel(); }

inline char* dynamic_shared() { return emulation::dynamic_shared.data(); }

inline void keep(int&) {}

template <int kBytes>
void copy_to_shared(char* to, const void* from, bool present) {
  static_assert(kBytes == 16 || kBytes == 4);
  if ((to - dynamic_shared()) % kBytes) ++emulation::faults;
  const bool reads = present && emulation::may_read(from, kBytes);
  emulation::copies().begin(to, reads ? from : nullptr, kBytes);
}

inline void end_copies() { emulation::copies().end_group(); }

template <int kPending>
void wait_for_copies() {
  emulation::copies().wait_for_all_but(kPending);
}

inline void load_matrices(uint32_t (&words)[4], const char* row) {
  const unsigned lane = threadIdx.x % 32;
  const auto rows = emulation::exchange(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&words[matrix], rows[8 * matrix + lane / 4] + lane % 4 * 4, 4);
  }
}

inline void load_matrices_transposed(uint32_t (&words)[4], const char* row) {
  const unsigned lane = threadIdx.x % 32;
  const auto rows = emulation::exchange(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&pair[i], rows[8 * matrix + lane % 4 * 2 + i] + lane / 4 * 2, 2);
    }
    std::memcpy(&words[matrix], pair, 4);
  }
}

// How a tensor core adds: it aligns the products of a group, and the sum so far, to the largest of
// their exponents and cuts off what lies more than `bits` below; the sum, too, is cut to a float.
// An A100 takes a step in two groups and keeps 24 bits, an H100 all of it at once and 25.
struct TensorCore {
  int bits;
  int groups;
};
inline TensorCore tensor_core = {24, 2};

// Of a product it is the sum of its factors' exponents, though it may be up to four times as large.
inline int exponent_of(float value) {
  return static_cast<int>(__float_as_uint(value) >> 23 & 255) - 127;
}

inline float cut_off(double sum) {
  const auto value = static_cast<float>(sum);
  return std::fabs(value) > std::fabs(sum) && std::isfinite(sum) ? std::nextafter(value, 0.0f)
                                                                 : value;
}

inline float add_products(float sum, const float* a, const float* b, int count) {
  int most = sum == 0 ? INT32_MIN : exponent_of(sum);
  double exact = sum;
  for (int i = 0; i < count; ++i) {
    const double product = double{a[i]} * b[i];
    exact += product;
    if (product != 0) most = std::max(most, exponent_of(a[i]) + exponent_of(b[i]));
  }
  if (!std::isfinite(exact) || most == INT32_MIN) return static_cast<float>(exact);
  const double unit = std::ldexp(1.0, most - tensor_core.bits);
  auto units = static_cast<int64_t>(sum / unit);
  for (int i = 0; i < count; ++i) units += static_cast<int64_t>(double{a[i]} * b[i] / unit);
  return cut_off(static_cast<double>(units) * unit);
}

// A register holds kPerWord elements; a row of a or b has 8 registers' worth, in four lanes.
template <int kPerWord, class Widen>
void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
         uint32_t b1, Widen widen) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::array<float, 6 * kPerWord> elements;
  for (int i = 0; i < 6 * kPerWord; ++i) {
    const uint32_t word = words[i / kPerWord];
    elements[i] = widen(kPerWord == 1 ? word : word >> i % kPerWord * 16 & 0xffff);
  }
  const auto lanes = emulation::exchange(elements);
  const unsigned lane = threadIdx.x % 32;
  float* sums[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4;  // and eight below it, in a's second and fourth register
    const unsigned column = lane % 4 * 2 + i % 2;
    float from_a[8 * kPerWord], from_b[8 * kPerWord];  // along the positions
    for (int word = 0; word < 8; ++word) {
      for (int j = 0; j < kPerWord; ++j) {
        from_a[word * kPerWord + j] =
            lanes[row * 4 + word % 4][(word / 4 * 2 + i / 2) * kPerWord + j];
        from_b[word * kPerWord + j] = lanes[column * 4 + word % 4][(4 + word / 4) * kPerWord + j];
      }
    }
    const int count = 8 * kPerWord / tensor_core.groups;
    for (int first = 0; first < 8 * kPerWord; first += count) {
      *sums[i] = add_products(*sums[i], from_a + first, from_b + first, count);
    }
  }
}

inline void mma_f16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
                    uint32_t b1) {
  mma<2>(d0, d1, d2, d3, a, b0, b1, [](uint32_t bits) { return __half2float(bits); });
}

inline void mma_bf16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                     uint32_t b0, uint32_t b1) {
  mma<2>(d0, d1, d2, d3, a, b0, b1, [](uint32_t bits) { return __uint_as_float(bits << 16); });
}

inline void mma_tf32(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                     uint32_t b0, uint32_t b1) {
  mma<1>(d0, d1, d2, d3, a, b0, b1, [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); });
}

// To nearest, ties away from zero; infinities and NaN stay.
inline uint32_t round_to_tf32(uint32_t bits) {
  return std::isfinite(__uint_as_float(bits)) ? (bits + 0x1000) & ~0x1fffu : bits;
}

}  // namespace tk

// csrc/cuda/ptx.cuh for a CPU. A warp's lanes hand over their registers; which element of a
// matrix a register holds is written down here once more, from the PTX manual's sections on mma and
// ldmatrix.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>

namespace tk {

inline char* dynamic_shared() { return emulation::dynamic_shared.data(); }

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

// A tensor core keeps the sum of a step exactly, or nearly so, and cuts it off: it rounds to zero.
inline float cut_off(double sum) {
  const auto value = static_cast<float>(sum);
  return std::fabs(value) > std::fabs(sum) && std::isfinite(sum) ? std::nextafter(value, 0.0f)
                                                                 : value;
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
    double sum = *sums[i];
    for (int word = 0; word < 8; ++word) {
      const float* from_a = &lanes[row * 4 + word % 4][(word / 4 * 2 + i / 2) * kPerWord];
      const float* from_b = &lanes[column * 4 + word % 4][(4 + word / 4) * kPerWord];
      for (int j = 0; j < kPerWord; ++j) sum += double{from_a[j]} * from_b[j];
    }
    *sums[i] = cut_off(sum);
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

// What a warp does with a staged chunk: sums[f][c] += Σ_p dy[f][p] · x[c][p] for its 32 filters and
// 16 or 32 columns. A Product is a struct:
//   Chunk<kRows>   how either side is staged
//   kSpan          positions that its sums may add up
//   rounded()      a word of elements, as they are staged
//   row(i), column(j)  the filter and the column of a lane's sums[i][j]
//   multiply()     of the chunk at `a` and `b`, where the warp's first filter and column begin
#pragma once

#include "cuda/conv2d_fisher/global_to_shared.cuh"
#include "cuda/ptx.cuh"

namespace tk {

constexpr int kLaneFilters = 4;
constexpr int kSteps = kRowBytes / 32;  // of tensor cores, to a chunk

__device__ inline int lane() { return threadIdx.x % kWarp; }

template <DType kType, bool kInside>
struct ProductTypes {
  static constexpr bool kChannelsInside = kInside;
  using E = Element<kType>;
  template <int kRows>
  using Chunk = std::conditional_t<kInside, ChannelsChunk<E, kRows>, PositionsChunk<E, kRows>>;
};

// On tensor cores. f32 means TF32.
template <DType kType, bool kInside>
struct Mma : ProductTypes<kType, kInside> {
  static constexpr int kSpan = span_of(kType, true);

  static __device__ uint32_t rounded(uint32_t word) {
    return kType == DType::f32 ? round_to_tf32(word) : word;
  }

  static __device__ int row(int i) { return i * 8 + lane() / 4; }
  static __device__ int column(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }

  template <int kPitchA, int kPitchB, int kColumns>
  static __device__ void multiply(float (&sums)[kLaneFilters][kColumns], const char* a,
                                  const char* b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t filters[kLaneFilters / 2][4];
#pragma unroll
      for (int i = 0; i < kLaneFilters / 2; ++i) {
        load_16<kPitchA, true>(filters[i], a, step, i);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j) {
        uint32_t columns[4];
        load_16<kPitchB, false>(columns, b, step, j);
#pragma unroll
        for (int i = 0; i < kLaneFilters / 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = 4 * j + 2 * half;
            mma(sums[2 * i][c], sums[2 * i][c + 1], sums[2 * i + 1][c], sums[2 * i + 1][c + 1],
                filters[i], columns[2 * half], columns[2 * half + 1]);
          }
        }
      }
    }
  }

 private:
  static __device__ void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                             uint32_t b0, uint32_t b1) {
    if constexpr (kType == DType::f16) mma_f16(d0, d1, d2, d3, a, b0, b1);
    if constexpr (kType == DType::bf16) mma_bf16(d0, d1, d2, d3, a, b0, b1);
    if constexpr (kType == DType::f32) mma_tf32(d0, d1, d2, d3, a, b0, b1);
  }

  // The four matrices of 8 rows by 16 bytes that 16 rows hold at a step, in the order that mma
  // takes them: of filters first the two at the same positions, of columns those of the same rows.
  template <int kPitch, bool kFilters>
  static __device__ void load_16(uint32_t (&words)[4], const char* stage, int step, int block) {
    const auto row = [=](int matrix) {
      return 16 * block + 8 * (kFilters ? matrix % 2 : matrix / 2);
    };
    const auto half = [](int matrix) { return kFilters ? matrix / 2 : matrix % 2; };
    if constexpr (!kInside) {
      const int from = (row(lane() / 8) + lane() % 8) * kPitch;
      load_matrices(words, stage + from + 32 * step + 16 * half(lane() / 8));
    } else if constexpr (kType != DType::f32) {
      const int position = 16 * step + 8 * half(lane() / 8) + lane() % 8;
      load_matrices_transposed(words, stage + position * kPitch + row(lane() / 8) * 2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = 8 * step + 4 * half(i) + lane() % 4;
        const char* from = stage + position * kPitch + (row(i) + lane() / 4) * 4;
        words[i] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
  }
};

// In float32 throughout, for f32.
template <bool kInside>
struct Fma : ProductTypes<DType::f32, kInside> {
  static constexpr int kSpan = span_of(DType::f32, false);

  static __device__ uint32_t rounded(uint32_t word) { return word; }

  // Lanes read whole vectors of shared memory: along the positions, or four rows side by side.
  static __device__ int row(int i) { return kInside ? lane() / 4 * 4 + i : i * 8 + lane() / 4; }
  static __device__ int column(int j) {
    return kInside ? j / 4 * 16 + lane() % 4 * 4 + j % 4 : j * 4 + lane() % 4;
  }

  template <int kPitchA, int kPitchB, int kColumns>
  static __device__ void multiply(float (&sums)[kLaneFilters][kColumns], const char* a,
                                  const char* b) {
    constexpr int kPositions = kRowBytes / 4;
    if constexpr (kInside) {
#pragma unroll
      for (int p = 0; p < kPositions; ++p) {
        float filters[kLaneFilters];
        load_four(filters, a + p * kPitchA + row(0) * 4);
#pragma unroll
        for (int j = 0; j < kColumns; j += 4) {
          float columns[4];
          load_four(columns, b + p * kPitchB + column(j) * 4);
#pragma unroll
          for (int i = 0; i < kLaneFilters; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sums[i][j + c] = __fmaf_rn(filters[i], columns[c], sums[i][j + c]);
            }
          }
        }
      }
    } else {
#pragma unroll 1
      for (int p = 0; p < kPositions; p += 4) {
        float filters[kLaneFilters][4];
#pragma unroll
        for (int i = 0; i < kLaneFilters; ++i) load_four(filters[i], a + row(i) * kPitchA + p * 4);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float columns[4];
          load_four(columns, b + column(j) * kPitchB + p * 4);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (int i = 0; i < kLaneFilters; ++i) {
              sums[i][j] = __fmaf_rn(filters[i][q], columns[q], sums[i][j]);
            }
          }
        }
      }
    }
  }

 private:
  static __device__ void load_four(float (&values)[4], const char* from) {
    const float4 loaded = *reinterpret_cast<const float4*>(from);
    values[0] = loaded.x;
    values[1] = loaded.y;
    values[2] = loaded.z;
    values[3] = loaded.w;
  }
};

}  // namespace tk

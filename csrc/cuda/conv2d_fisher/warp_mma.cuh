// What a warp does with a staged chunk: sums[f][c] += Σ_p dy[f][p] · x[c][p] for its 32 or 64
// filters and 16 or 32 columns. A Product is a struct:
//   Chunk<kRows>   how either side is staged
//   kSpan          positions that its sums may add up
//   rounded()      a word of elements, as they are staged
//   row(i), column(j)  the filter and the column of a lane's sums[i][j]
//   Operand        what lanes read of a side, from the warp's first filter or column on
//   multiply()     of the chunk whose sides are staged at `a` and `b`
#pragma once

#include "cuda/conv2d_fisher/global_to_shared.cuh"
#include "cuda/ptx.cuh"

namespace tk {

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

  // The four matrices of 8 rows by 16 bytes that 16 rows hold at a step, in the order that mma
  // takes them: of filters first the two at the same positions, of columns those of the same rows.
  // Where a lane finds them is computed once; from there on steps and rows lie at distances that
  // are constants, but where vectors are swapped. Then there are as many places as they differ.
  template <class Chunk, int kRows, bool kFilters>
  class Operand {
    static constexpr bool kWords = kInside && kType == DType::f32;
    static constexpr int kPlaces = kWords ? 4 : kInside ? kRows / 16 : kSteps;
    int places_[kPlaces];

    static __device__ int row_of(int matrix) { return 8 * (kFilters ? matrix % 2 : matrix / 2); }
    static __device__ int half_of(int matrix) { return kFilters ? matrix / 2 : matrix % 2; }

   public:
    __device__ explicit Operand(int first) {
      const int matrix = lane() / 8;
      const int row = first + row_of(matrix);
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        if constexpr (kWords) {
          places_[i] = Chunk::at(first + 8 * i + lane() / 4, lane() % 4);
        } else if constexpr (kInside) {
          places_[i] = Chunk::at(row + 16 * i, 8 * half_of(matrix) + lane() % 8);
        } else {
          places_[i] = Chunk::at(row + lane() % 8, 2 * i + half_of(matrix));
        }
        if (!kWords) keep(places_[i]);  // eight more would not fit sm_80's registers
      }
    }

    // Of 16 rows, the block-th.
    __device__ void load(uint32_t (&words)[4], const char* stage, int block, int step) const {
      if constexpr (kWords) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int rows = 2 * block + row_of(i) / 8;
          const char* from = stage + places_[rows % 4] + Chunk::at(rows / 4 * 32, 0) +
                             Chunk::at(0, 8 * step + 4 * half_of(i));
          words[i] = *reinterpret_cast<const uint32_t*>(from);
        }
      } else if constexpr (kInside) {
        load_matrices_transposed(words, stage + places_[block] + Chunk::at(0, 16 * step));
      } else {
        load_matrices(words, stage + places_[step] + Chunk::at(16 * block, 0));
      }
      if constexpr (!Chunk::kRounded) {
#pragma unroll
        for (uint32_t& word : words) word = rounded(word);
      }
    }
  };

  template <class Filters, class Columns, int kFilters, int kColumns>
  static __device__ void multiply(float (&sums)[kFilters][kColumns], const Filters& from_a,
                                  const char* a, const Columns& from_b, const char* b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t filters[kFilters / 2][4];
#pragma unroll
      for (int i = 0; i < kFilters / 2; ++i) from_a.load(filters[i], a, i, step);
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j) {
        uint32_t columns[4];
        from_b.load(columns, b, j, step);
#pragma unroll
        for (int i = 0; i < kFilters / 2; ++i) {
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

  template <class Chunk, int, bool>
  struct Operand {
    static constexpr int kPitch = Chunk::kPitch;
    int first;  // byte

    __device__ explicit Operand(int row) : first(row * Chunk::kRowStep) {}
  };

  template <class Filters, class Columns, int kLaneFilters, int kColumns>
  static __device__ void multiply(float (&sums)[kLaneFilters][kColumns], const Filters& from_a,
                                  const char* a, const Columns& from_b, const char* b) {
    static_assert(kLaneFilters == 4);
    constexpr int kPitchA = Filters::kPitch;
    constexpr int kPitchB = Columns::kPitch;
    constexpr int kPositions = kRowBytes / 4;
    a += from_a.first;
    b += from_b.first;
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

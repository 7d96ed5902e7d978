// The inner loop of conv2d_fisher on the CPU: a tile of products, summed over positions in
// registers, then squared (or not yet) and added to a tile of sums.
//
// Both factors lie in panels, [position][elements], widened to the scalar of the sums. A tile is
// kRows elements of the one times kVectors vectors of the other: every row meets all lanes; or,
// lane by lane ("lanewise"), a row is a vector itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// The sums of the largest tile take half of the registers where there are many, else three
// quarters.
constexpr int kMaxRows = kRegisters == 32 ? 8 : 6;
constexpr int kMaxVectors = 2;
constexpr int kMaxLanewiseRows = 4;

// Where the products of a tile lie: rows × columns positions of each example, as steps through the
// panels.
struct Walk {
  int64_t examples, rows, columns;
  int64_t a_example, a_row, a_column;
  int64_t b_example, b_row, b_column;
};

// sums[r][v] += (Σ over positions of a[r]·b[v])² for each example; without the square if !square.
// With kNorms, sums[example] += Σ over r and v of these squares, a vector for each example.
template <typename S, int kRows, int kVectors, bool kLanewise, bool kNorms>
[[gnu::noinline]] void sum_tile(const S* a, const S* b, const Walk& walk, bool square, S* sums) {
  constexpr int kWidth = Sum<S>::kWidth;
  using V = typename Sum<S>::Vector;
  // Positions side by side: about eight independent sums hide the latency of an addition.
  constexpr int kTile = kRows * kVectors;
  constexpr int kSplit = kTile >= 8 ? 1 : kTile >= 3 ? 2 : 4;
  V total[kRows][kVectors];
  if constexpr (!kNorms) std::memcpy(&total, sums, sizeof(total));
  for (int64_t n = 0; n < walk.examples; ++n) {
    V sum[kSplit][kRows][kVectors] = {};
    for (int64_t row = 0; row < walk.rows; ++row) {
      const S* pa = a + n * walk.a_example + row * walk.a_row;
      const S* pb = b + n * walk.b_example + row * walk.b_row;
      auto step = [&](auto split) {
        V lanes[kVectors];
        unrolled<kVectors>([&](auto v) { lanes[v] = load(pb + v * kWidth); });
        unrolled<kRows>([&](auto r) {
          const V factor = kLanewise ? load(pa + r * kWidth) : pa[r] - V{};
          unrolled<kVectors>(
              [&](auto v) { sum[split][r][v] = multiply_add(factor, lanes[v], sum[split][r][v]); });
        });
        pa += walk.a_column;
        pb += walk.b_column;
      };
      int64_t column = 0;
      for (; column + kSplit <= walk.columns; column += kSplit) unrolled<kSplit>(step);
      if (kSplit > 1)
        for (; column < walk.columns; ++column) step(std::integral_constant<int, 0>());
    }
    V norm = kNorms ? load(sums + n * kWidth) : V{};
    unrolled<kRows>([&](auto r) {
      unrolled<kVectors>([&](auto v) {
        V each = sum[0][r][v];
        for (int split = 1; split < kSplit; ++split) each += sum[split][r][v];
        if constexpr (kNorms)
          norm = multiply_add(each, each, norm);
        else
          total[r][v] = square ? multiply_add(each, each, total[r][v]) : total[r][v] + each;
      });
    });
    if constexpr (kNorms) std::memcpy(sums + n * kWidth, &norm, sizeof(norm));
  }
  if constexpr (!kNorms) std::memcpy(sums, &total, sizeof(total));
}

template <typename S>
using SumTile = void (*)(const S* a, const S* b, const Walk& walk, bool square, S* sums);

template <typename S, int kVectors, bool kLanewise, bool kNorms, int kRows>
SumTile<S> sum_tile_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return sum_tile_of<S, kVectors, kLanewise, kNorms, kRows - 1>(rows);
  return sum_tile<S, kRows, kVectors, kLanewise, kNorms>;
}

template <typename S, bool kNorms>
SumTile<S> sum_tile_of(int64_t rows, int64_t vectors, bool lanewise) {
  if (lanewise)
    return vectors == 1 ? sum_tile_of<S, 1, true, kNorms, kMaxLanewiseRows>(rows)
                        : sum_tile_of<S, 2, true, kNorms, kMaxLanewiseRows>(rows);
  return vectors == 1 ? sum_tile_of<S, 1, false, kNorms, kMaxRows>(rows)
                      : sum_tile_of<S, 2, false, kNorms, kMaxRows>(rows);
}

}  // namespace TK_ISA
}  // namespace tk

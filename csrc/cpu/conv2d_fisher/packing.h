// How conv2d_fisher on the CPU lays x and dy out for its inner loop: as panels, [position][width]
// of some channels of an example, widened to the scalar of the sums, zeros where a panel is wider
// than what is left. Both memory layouts become the same panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/conv2d_fisher/micro_kernel.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// One of the two factors and its cut into panels. A gang is what shares panels: a group, or, where
// the lanes of a vector are groups, as many of them. A panel holds `rows` channels of each group of
// a gang, those of one row side by side. Panels in place are not packed: tiles read the tensor.
struct Factor {
  const void* data;
  bool channels_last;
  int64_t batch, groups, channels;  // channels of a group
  int64_t height, width;
  int64_t gang, rows;
  bool in_place = false;

  int64_t positions() const { return height * width; }
  int64_t blocks() const { return (channels + rows - 1) / rows; }
  int64_t panel_width() const { return rows * gang; }
  int64_t panel_size() const { return positions() * panel_width(); }
  int64_t position_step() const { return in_place ? groups * channels : panel_width(); }
};

// Exchanges the lanes of a whose index has bit kBit with those of b whose index has not.
template <int kBit, typename V, size_t... kLane>
inline void exchange(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  const V low = __builtin_shufflevector(
      a, b, (int(kLane) & kBit ? kWidth + int(kLane) - kBit : int(kLane))...);
  b = __builtin_shufflevector(a, b,
                              (int(kLane) & kBit ? kWidth + int(kLane) : int(kLane) + kBit)...);
  a = low;
}

template <int kBit, typename V, int kWidth>
inline void transpose_square(V (&rows)[kWidth]) {
  if constexpr (kBit > 0) {
    for (int i = 0; i < kWidth; ++i)
      if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit], std::make_index_sequence<kWidth>());
    transpose_square<kBit / 2>(rows);
  }
}

// to[k · to_step + i] = from[i · from_step + k] for k < kLanes and i < n ≤ kLanes. Writes kLanes
// elements for each of the first m k, in their order, so that the next may lie over the surplus.
template <typename S>
inline void transpose(const S* from, int64_t from_step, int64_t n, S* to, int64_t to_step,
                      int64_t m) {
  using V = typename Sum<S>::Vector;
  constexpr int kWidth = Sum<S>::kWidth, kSquares = kLanes / kWidth;
  for (int j = 0; j < kSquares; ++j) {
    V rows[kSquares][kWidth];
    for (int i = 0; i < kLanes; ++i)
      rows[i / kWidth][i % kWidth] = i < n ? load(from + i * from_step + j * kWidth) : V{};
    for (auto& square : rows) transpose_square<kWidth / 2>(square);
    for (int k = 0; k < kWidth && j * kWidth + k < m; ++k)
      for (int i = 0; i < kSquares; ++i)
        std::memcpy(to + (j * kWidth + k) * to_step + i * kWidth, &rows[i][k], sizeof(rows[i][k]));
  }
}

template <typename S>
using Square = S[kLanes][kLanes];

// n ≤ kLanes channels, `step` apart, at m ≤ kLanes positions: to[position][channel], 0 elsewhere.
template <typename T>
void gather(const Factor& f, int64_t example, int64_t channel, int64_t step, int64_t n,
            int64_t position, int64_t m, Square<typename Sum<T>::Scalar>& to) {
  const int64_t channels = f.groups * f.channels;
  const int64_t size = f.batch * channels * f.positions();
  const T* data = static_cast<const T*>(f.data);
  if (!f.channels_last && f.positions() > 1) {
    Square<typename Sum<T>::Scalar> rows;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t at = (example * channels + channel + c * step) * f.positions() + position;
      // Sixteen rows at once are too many for the hardware to follow: 2 to 4 times the speed.
      __builtin_prefetch(data + at + 4 * kLanes);
      widen(data + at, m, size - at, rows[c]);
    }
    return transpose(rows[0], kLanes, n, to[0], kLanes, m);
  }
  for (int64_t p = 0; p < m; ++p) {
    const int64_t at = (example * f.positions() + position + p) * channels + channel;
    if (step == 1) {
      widen(data + at, n, size - at, to[p]);
      continue;
    }
    std::fill_n(to[p], kLanes, 0);
    for (int64_t c = 0; c < n; ++c) to[p][c] = load_first(data + at + c * step, 1, 1)[0];
  }
}

// Panel `block` of the gang that begins with `group`.
template <typename T>
void pack(const Factor& f, int64_t example, int64_t group, int64_t block,
          typename Sum<T>::Scalar* to) {
  using S = typename Sum<T>::Scalar;
  const bool lanewise = f.gang > 1;
  const int64_t width = f.panel_width();
  const int64_t run = std::min<int64_t>(lanewise ? f.gang : width, kLanes);  // channels at a time
  Square<S> square;
  for (int64_t p = 0; p < f.positions(); p += kLanes) {
    const int64_t m = std::min<int64_t>(kLanes, f.positions() - p);
    for (int64_t at = 0; at < width; at += run) {
      const int64_t row = block * f.rows + (lanewise ? at / run : at);
      const int64_t left = row >= f.channels ? 0 : lanewise ? f.groups - group : f.channels - row;
      gather<T>(f, example, group * f.channels + row, lanewise ? f.channels : 1,
                std::min(run, left), p, m, square);
      for (int64_t i = 0; i < m; ++i) {
        S* place = to + (p + i) * width + at;
        // Whole vectors where what they spill over is written later.
        if (run == kLanes || (run == width && (p + i) * width + kLanes <= f.panel_size()))
          std::memcpy(place, square[i], sizeof(square[i]));
        else
          std::copy_n(square[i], run, place);
      }
    }
  }
}

}  // namespace TK_ISA
}  // namespace tk

// How conv2d_fisher on the CPU lays x and dy out for its inner loop: as panels, [position][width]
// of some channels of an example, widened to the scalar of the sums, zeros where a panel is wider
// than what is left. Both memory layouts become the same panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "conv2d_fisher_tile.h"
#include "simd.h"

namespace tk {
inline namespace TK_ISA {

// One of the two factors, and its cut into panels: `blocks` of them for a group, or, where the
// lanes of a vector are groups, for `kWidth` groups.
struct Factor {
  const void* data;
  bool channels_last;
  int64_t batch, groups, channels;  // channels of a group
  int64_t height, width;
  bool lanewise;
  int64_t lanes;   // lanewise: groups side by side, else 1
  int64_t rows;    // channels of a group in a panel
  int64_t blocks;  // ⌈channels / rows⌉

  int64_t positions() const { return height * width; }
  int64_t panel_width() const { return rows * lanes; }
  int64_t panel_size() const { return positions() * panel_width(); }
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

template <typename S>
using Square = S[kLanes][kLanes];

template <typename S>
inline void transpose(const Square<S>& from, Square<S>& to) {
  using R = Register<S>;
  for (int i = 0; i < kLanes; i += R::kWidth)
    for (int j = 0; j < kLanes; j += R::kWidth) {
      typename R::Vector rows[R::kWidth];
      for (int k = 0; k < R::kWidth; ++k) rows[k] = R::load(&from[i + k][j]);
      transpose_square<R::kWidth / 2>(rows);
      for (int k = 0; k < R::kWidth; ++k) std::memcpy(&to[j + k][i], &rows[k], sizeof(rows[k]));
    }
}

// n ≤ kLanes channels, `step` apart, at m ≤ kLanes positions: to[position][channel], 0 elsewhere.
template <typename T>
void gather(const Factor& f, int64_t example, int64_t channel, int64_t step, int64_t n,
            int64_t position, int64_t m, Square<typename Sum<T>::Scalar>& to) {
  using V = typename Sum<T>::Vector;
  const int64_t channels = f.groups * f.channels;
  const int64_t size = f.batch * channels * f.positions();
  const T* data = static_cast<const T*>(f.data);
  auto read = [&](int64_t at, int64_t count) {
    return count == kLanes ? load(data + at) : load_first(data + at, count, size - at);
  };
  if (!f.channels_last && f.positions() > 1) {
    Square<typename Sum<T>::Scalar> rows;
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t at = (example * channels + channel + c * step) * f.positions() + position;
      const V v = c < n ? read(at, m) : V{};
      std::memcpy(rows[c], &v, sizeof(v));
    }
    return transpose(rows, to);
  }
  for (int64_t p = 0; p < m; ++p) {
    const int64_t at = (example * f.positions() + position + p) * channels + channel;
    V v = {};
    if (step == 1)
      v = read(at, n);
    else
      for (int64_t c = 0; c < n; ++c) v[c] = load_first(data + at + c * step, 1)[0];
    std::memcpy(to[p], &v, sizeof(v));
  }
}

// The panel of block `block` of a group, or of kWidth groups from `group` on.
template <typename T>
void pack(const Factor& f, int64_t example, int64_t group, int64_t block,
          typename Sum<T>::Scalar* to) {
  using S = typename Sum<T>::Scalar;
  const int64_t width = f.panel_width();
  const int64_t run = f.lanewise ? f.lanes : std::min<int64_t>(width, kLanes);
  Square<S> square;
  for (int64_t p = 0; p < f.positions(); p += kLanes) {
    const int64_t m = std::min<int64_t>(kLanes, f.positions() - p);
    for (int64_t at = 0; at < width; at += run) {
      const int64_t count = std::min(run, width - at);
      const int64_t row = block * f.rows + (f.lanewise ? at / run : at);
      int64_t n = 0;
      if (row < f.channels) n = std::min(count, f.lanewise ? f.groups - group : f.channels - row);
      gather<T>(f, example, group * f.channels + row, f.lanewise ? f.channels : 1, n, p, m, square);
      for (int64_t i = 0; i < m; ++i) {
        S* place = to + (p + i) * width + at;
        // Whole vectors where what they spill over is written later.
        if (count == kLanes || (width == run && (p + i) * width + kLanes <= f.panel_size()))
          std::memcpy(place, square[i], sizeof(square[i]));
        else
          std::copy_n(square[i], count, place);
      }
    }
  }
}

}  // namespace TK_ISA
}  // namespace tk

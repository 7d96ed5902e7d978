// Tables written several rows at once, from registers that hold a quad of each (short_rows.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/moment_loops.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Whether registers hold the quads of several rows, and are turned so that they do.
template <typename S>
constexpr bool kSeveralRows = kRegisterBytes >= 32 && std::is_same_v<S, float>;

// Writes rows of a table, of which registers hold the sums. A column that was not wanted is NaN.
template <class Op, typename S>
class RowWriter {
  using V = typename Sum<S>::Vector;
  using I = typename Sum<S>::Integers;
  using Lane = decltype(I{}[0] + I{}[0]);
  static constexpr int kRows = Sum<S>::kWidth / 4;
  static constexpr int kColumns = columns<Op>();

  // A sum alone is in every lane of its quad, where any column finds it. Of several, and of tables
  // of fewer than five columns, in which all are wanted, sum m has to be column m.
  static constexpr bool fits() {
    if (Op::kSums != kColumns) return Op::kSums == 1 && kColumns == 5;
    if constexpr (requires { Op::kColumn; }) {
      for (int m = 0; m < kColumns; ++m) {
        if (Op::kColumn[m] != m) return false;
      }
    }
    return kColumns <= 5;
  }
  static_assert(fits());

  I first_four_{}, fifth_{};  // of all bits where a column is wanted

 public:
  explicit RowWriter(const Op& op) {
    if constexpr (kColumns == 5) {
      uint32_t summed = 0;
      for (const int column : Op::kColumn) summed |= 1u << column;
      // In registers alone: what is stored lane by lane is waited for when it is loaded.
      const I wanted = static_cast<Lane>(op.wanted & summed) - I{};
      const I column = (I{} + 1) << (lane_numbers<S>() & 3);
      first_four_ = (wanted & column) == column;
      fifth_ = (wanted & 16) == 16;
    }
  }

  // kRows rows, `apart` rows from one to the next. Each has a quad in two registers: its first four
  // sums, or fewer and then as many as there are again, and the fifth, if there is one.
  void operator()(V four, V fifth, S* out, int64_t apart) const {
    if constexpr (kColumns == 5) {
      const V nan = splat<V>(std::numeric_limits<double>::quiet_NaN());
      four = first_four_ ? four : nan;
      fifth = fifth_ ? fifth : nan;
    }
    S each[2][Sum<S>::kWidth];
    std::memcpy(each[0], &four, sizeof(four));
    std::memcpy(each[1], &fifth, sizeof(fifth));
    for (int row = 0; row < kRows; ++row) {
      S* to = out + row * apart * kColumns;
      std::memcpy(to, each[0] + 4 * row, std::min(4, kColumns) * sizeof(S));
      if (kColumns == 5) to[4] = each[1][4 * row];
    }
  }
};

// The same of rows of which each has a lane: those of a quad are turned to a row each.
template <class Op, typename S, typename V>
[[gnu::always_inline]] inline void write_turned(const RowWriter<Op, S>& write,
                                                const V (&sums)[Op::kSums][1], S* out) {
  const auto sum = [&](int m) { return sums[m < Op::kSums ? m : 0][0]; };
  const V fours[] = {sum(0), sum(1), sum(2), sum(3)};
  turn(fours, [&](auto row, V four) {
    const V fifth = shuffle_quads<row, row, row, row>(sum(4), sum(4));
    write(four, fifth, out + row * columns<Op>(), 4);
  });
}

// Adds up the quads of several rows, quads(m) those of sum m, and writes the rows' sums.
template <class Op, typename S, class Each>
[[gnu::always_inline]] inline void write_quads(const RowWriter<Op, S>& write, const Each& quads,
                                               S* out) {
  const auto four = add_quads<std::min(4, Op::kSums)>(quads);
  const auto fifth = [&] {
    if constexpr (Op::kSums == 5)
      return add_quads<1>([&](auto) { return quads(std::integral_constant<int, 4>()); });
    else
      return four;
  }();
  write(four, fifth, out, 1);
}

}  // namespace TK_ISA
}  // namespace tk

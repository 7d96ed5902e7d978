// The loops of the CPU kernels over the elements of a task, for an op (moment_sums.h). Each is a
// function of its own: the compiler has all registers for it, and tests/ops/test_machine_code.py
// finds it by its name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/moment_blocking.h"
#include "cpu/simd.h"

// A run's tail in line, or as the compiler likes: each keeps sums in registers where the other puts
// some of them on the stack.
#if defined(__aarch64__)
#define TK_TAIL __attribute__((always_inline))
#else
#define TK_TAIL
#endif

namespace tk {
inline namespace TK_ISA {

constexpr int64_t kRowRun = 2048;  // elements of a row summed in float before double

// Ways to ask for a cache line: into the first-level cache, or into the second.
struct Soon {
  void operator()(const void* p) const { __builtin_prefetch(p, 0, 3); }
};
struct Later {
  void operator()(const void* p) const { __builtin_prefetch(p, 0, 2); }
};

template <class Op>
using Sums = double[Op::kSums];

// Columns of a table: an op that can leave sums out has a column for each of them nevertheless.
template <class Op>
constexpr int columns() {
  if constexpr (requires { Op::kColumns; })
    return Op::kColumns;
  else
    return Op::kSums;
}

// Whether a table holds the sums of a filter as they are, side by side.
template <class Op>
bool wants_all(const Op& op) {
  if constexpr (requires { Op::kColumns; }) {
    constexpr uint32_t kAll = (1u << Op::kColumns) - 1;
    return Op::kSums == Op::kColumns && (op.wanted & kAll) == kAll;
  } else {
    return true;
  }
}

// The row of a filter in a table; `sum(m)` is its sum m. A column that was not wanted is NaN.
template <class Op, typename S, class Sum>
[[gnu::always_inline]] inline void write_row(const Op& op, const Sum& sum, S* row) {
  if constexpr (requires { Op::kColumns; }) {
    for (int c = 0; c < Op::kColumns; ++c) row[c] = std::numeric_limits<S>::quiet_NaN();
    for (int m = 0; m < Op::kSums; ++m) {
      if (op.wanted >> Op::kColumn[m] & 1) row[Op::kColumn[m]] = sum(m);
    }
  } else {
    for (int m = 0; m < Op::kSums; ++m) row[m] = sum(m);
  }
}

// Ways to read a register: all of it, or its first n lanes where `readable` elements may be read.
// bits(i, at) is a bit of each element that is read from element i on; at(i) is those of elements
// side by side.
struct SideBySide {
  template <class At>
  uint32_t bits(int64_t i, const At& at) const {
    return at(i);
  }
};
struct Whole : SideBySide {
  template <typename T>
  auto operator()(const T* p) const {
    return load(p);
  }
};
struct First : SideBySide {
  int64_t n, readable;
  First(int64_t count, int64_t from_there) : n(count), readable(from_there) {}
  template <typename T>
  auto operator()(const T* p) const {
    return load_first(p, n, readable);
  }
};

// What the sums of an op are made of, for a register of elements.
template <class Op, typename T, class Reader, class Load>
[[gnu::always_inline]] inline auto terms_at(const T* w, const Reader& reader, int64_t i,
                                            const Load& load) {
  using V = typename Sum<T>::Vector;
  const V a = load(w + i);
  return typename Op::template Terms<V>{a, reader.of(a, i, load)};
}

// Adds them to each sum, `registers` apart, one after another: all at once take more registers.
template <class Op, class Terms, typename V, int registers>
[[gnu::always_inline]] inline void add_terms(const Terms& terms, V (&sums)[Op::kSums][registers],
                                             int to) {
  unrolled<Op::kSums>([&](auto m) { sums[m][to] = Op::template add<m>(terms, sums[m][to]); });
}

// What a run of a row adds up to, lane by lane, along memory. From w on, `readable` elements may be
// read; the first of them is element 0 of `multiplier`.
template <class Op, typename T, class Multiplier, typename V, int registers>
[[gnu::always_inline]] inline void sum_run(const T* w, Multiplier& multiplier, int64_t readable,
                                           int64_t begin, int64_t end,
                                           V (&sums)[Op::kSums][registers]) {
  using S = typename Sum<T>::Scalar;
  constexpr int kWidth = Sum<T>::kWidth;
  constexpr int kPasses = passes<S>(Op::kSums), kEach = registers / kPasses;
  const int64_t tail = end - (end - begin) % kLanes;
  multiplier.expect(begin, end);
  const auto add_up = [&](auto pass) __attribute__((always_inline)) {
    V part[Op::kSums][kEach] = {};
    const int64_t first = pass * kEach * kWidth;
    for (int64_t i = begin + first; i < tail; i += kLanes) {
      if (pass == 0) {  // later passes find them in cache
        Soon()(w + i + kAhead);
        multiplier.prefetch(i + kAhead, Soon());
      }
      unrolled<kEach>([&](auto k) __attribute__((always_inline)) {
        add_terms<Op>(terms_at<Op>(w, multiplier, i + k * kWidth, Whole()), part, k);
      });
    }
    if (tail < end)
      unrolled<kEach>([&](auto k) TK_TAIL {
        const int64_t i = tail + first + k * kWidth;
        add_terms<Op>(terms_at<Op>(w, multiplier, i, First{end - i, readable - i}), part, k);
      });
    for (int m = 0; m < Op::kSums; ++m)
      for (int k = 0; k < kEach; ++k) sums[m][pass * kEach + k] = part[m][k];
  };
  // unrolled() of one body in two functions is called, not inlined.
  if constexpr (kPasses == 1)
    add_up(std::integral_constant<int, 0>());
  else
    unrolled<kPasses>(add_up);
}

// Row sums alone, of `width` positions of each of `rows` rows from `first` on.
template <class Op, typename T, class Multiplier>
[[gnu::noinline]] void sum_rows(const T* w, Multiplier& multiplier, int64_t readable,
                                int64_t stride, int64_t first, int64_t rows, int64_t width,
                                Sums<Op>* row_sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (first + r) * stride;
    for (int64_t begin = row; begin < row + width; begin += kRowRun) {
      typename Sum<T>::Vector sums[Op::kSums][kRegistersOf<typename Sum<T>::Scalar>];
      sum_run<Op>(w, multiplier, readable, begin, std::min(begin + kRowRun, row + width), sums);
      add_lanes(sums, row_sums[r]);
    }
  }
}

// Column sums in L1, those of sixteen positions side by side: arrays 4 KB apart, one for each sum,
// would share their cache sets with each other and with rows of a power-of-two length.
template <class Op, typename S>
struct Strip {
  alignas(64) S sums[kStrip / kLanes][Op::kSums][kLanes];
};

// In how many passes, and how a strip asks for rows how far below. The hardware does not follow
// from one row to the next; measured on ResNet-50, to ask gives 1.0 to 1.4 times the speed, most
// where memory is fast. Where there are several passes, farther ahead and into the second-level
// cache gives 1.02 to 1.07 times that; where there is one, 0.96.
template <class Op, typename S, bool kRows>
struct StripPlan {
  static constexpr int kPasses = kRows ? passes<S>(2 * Op::kSums) : 1;
  static constexpr int64_t kBelow = kPasses > 1 ? 4 : 2;
  using Ask = std::conditional_t<(kPasses > 1), Later, Soon>;
};

// `width` ≤ kStrip positions of kCount rows, of which the multipliers read one each. Two rows are
// twice the independent sums and half the traffic to the strip. From w on, `readable` elements may
// be read. What lies `ahead` elements behind them is asked for: it is to be read next.
template <class Op, bool kRows, int kCount, typename T, class Multiplier>
[[gnu::noinline]] void sum_strip(const T* w, const Multiplier* multipliers, int64_t readable,
                                 int64_t ahead, int64_t first_row, int64_t stride, int64_t width,
                                 Sums<Op>* row_sums, Strip<Op, typename Sum<T>::Scalar>& strip) {
  using S = typename Sum<T>::Scalar;
  using V = typename Sum<T>::Vector;
  constexpr int kWidth = Sum<T>::kWidth;
  using Plan = StripPlan<Op, S, kRows>;
  constexpr int kPasses = Plan::kPasses;
  constexpr int kEach = kRegistersOf<S> / kPasses;
  const int64_t full = width / kLanes * kLanes;
  const T* row_w[kCount];
  decltype(multipliers[0].from(0)) row_multiplier[kCount];
  for (int row = 0; row < kCount; ++row) {
    const int64_t start = (first_row + row) * stride;
    row_w[row] = w + start;
    row_multiplier[row] = multipliers[row].from(start);
  }
  V sums[kCount * Op::kSums][kRegistersOf<S>];
  unrolled<kPasses>([&](auto pass) __attribute__((always_inline)) {
    V part[kCount][Op::kSums][kEach] = {};
    S* column = strip.sums[0][0];
    // Copies of its own: what is stored to columns might change those outside, for all it knows.
    const T* pass_w[kCount];
    decltype(multipliers[0].from(0)) pass_multiplier[kCount];
    std::copy_n(row_w, kCount, pass_w);
    std::copy_n(row_multiplier, kCount, pass_multiplier);
    const int64_t pass_ahead = ahead, pass_full = full;
    auto sixteen = [&](int64_t from, auto load_at) __attribute__((always_inline)) {
      unrolled<kEach>([&](auto k) {
        const int register_at = (pass * kEach + k) * kWidth;
        typename Op::template Terms<V> terms[kCount];
        unrolled<kCount>([&](auto row) {
          const int64_t i = from + register_at;
          terms[row] = terms_at<Op>(pass_w[row], pass_multiplier[row], i, load_at(row, i));
        });
        unrolled<Op::kSums>([&](auto index) {
          // The last sums first: those of factors alone, which are done with before products are
          // made. So the sums of two rows fit sixteen registers.
          constexpr std::integral_constant<int, Op::kSums - 1 - index> m;
          V sum = load(column + m * kLanes + register_at);
          unrolled<kCount>([&](auto row) {
            sum = Op::template add<m>(terms[row], sum);
            if (kRows) part[row][m][k] = Op::template add<m>(terms[row], part[row][m][k]);
          });
          std::memcpy(column + m * kLanes + register_at, &sum, sizeof(sum));
        });
      });
      column += Op::kSums * kLanes;
    };
    for (int64_t i = 0; i < pass_full; i += kLanes) {
      // Each pass asks for a row: all at once are more than a core has in flight, and the other
      // pass would ask for none.
      for (int row = pass; row < kCount; row += kPasses) {
        const typename Plan::Ask ask;
        ask(pass_w[row] + pass_ahead + i);
        pass_multiplier[row].prefetch(pass_ahead + i, ask);
      }
      sixteen(i, [](int, int64_t) { return Whole(); });
    }
    if (full < width)
      sixteen(full, [&](int row, int64_t i) {
        return First{width - i, readable - (first_row + row) * stride - i};
      });
    for (int row = 0; row < kCount; ++row)
      for (int m = 0; m < Op::kSums; ++m)
        for (int k = 0; k < kEach; ++k)
          sums[row * Op::kSums + m][pass * kEach + k] = part[row][m][k];
  });
  if (kRows) add_lanes(sums, row_sums[first_row]);  // of all rows: their totals lie side by side
}

template <class Op, bool kRows, typename T, class Multiplier>
void run_strip(const T* w, const Multiplier& multiplier, int64_t readable, int64_t stride,
               int64_t rows, int64_t width, Sums<Op>* row_sums,
               Strip<Op, typename Sum<T>::Scalar>& strip) {
  Multiplier each[] = {multiplier, multiplier};
  const int64_t below = std::min(StripPlan<Op, typename Sum<T>::Scalar, kRows>::kBelow, rows);
  for (int64_t r = 0; r < rows; r += 2) {
    // Rows below, or at the end of a strip the first ones of the next.
    const int64_t ahead = r + below < rows ? below * stride : kStrip + (below - rows) * stride;
    each[0].expect(r * stride, r * stride + width);
    if (r + 1 == rows)
      return sum_strip<Op, kRows, 1>(w, each, readable, ahead, r, stride, width, row_sums, strip);
    each[1].expect((r + 1) * stride, (r + 1) * stride + width);
    sum_strip<Op, kRows, 2>(w, each, readable, ahead, r, stride, width, row_sums, strip);
  }
}

}  // namespace TK_ISA
}  // namespace tk

// The loops of the CPU kernels over the elements of a task, for an op (moment_sums.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/moment_blocking.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

constexpr int64_t kRowRun = 4096;  // elements of a row summed in float before double

template <class Op>
using Sums = double[Op::kSums];

// Ways to read sixteen elements: all of them, the first n, and those where `readable` may be read.
struct Whole {
  template <typename T>
  auto operator()(const T* p) const {
    return load(p);
  }
};
struct First {
  int64_t n;
  template <typename T>
  auto operator()(const T* p) const {
    return load_first(p, n);
  }
};
struct FirstOf {
  int64_t n, readable;
  template <typename T>
  auto operator()(const T* p) const {
    return load_first(p, n, readable);
  }
};

// What the sums of an op add for one vector of elements.
template <class Op, typename V>
struct Terms {
  V of[Op::kSums];
  Terms(V w, V m) { Op::terms(w, m, of); }
};

template <class Op, typename V>
struct Registers {
  V of[Op::kSums] = {};
  void add(const Terms<Op, V>& t) {
    for (int m = 0; m < Op::kSums; ++m) of[m] += t.of[m];
  }
  void add(const Registers& other) {
    for (int m = 0; m < Op::kSums; ++m) of[m] += other.of[m];
  }
  void add_to(Sums<Op>& sums) const {
    for (int m = 0; m < Op::kSums; ++m) sums[m] += sum_lanes(of[m]);
  }
};

// Column sums, those of a vector of positions side by side: arrays 4 KB apart, one for each sum,
// would share their cache sets with each other and with rows of a power-of-two length.
template <class Op, typename V>
using Strip = Registers<Op, V>[kStrip / kLanes];

// Row sums alone, of `width` positions of each row: along memory, two vectors at a time. From w
// on, `readable` elements may be read; the first of them is element 0 of `multiplier`.
template <class Op, typename T, class Multiplier>
void sum_rows(const T* w, Multiplier multiplier, int64_t readable, int64_t stride, int64_t rows,
              int64_t width, Sums<Op>* row_sums) {
  using V = typename Sum<T>::Vector;
  auto terms = [&](int64_t i, auto load) {
    const V a = load(w + i);
    return Terms<Op, V>(a, multiplier.of(a, i, load));
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = r * stride; begin < r * stride + width; begin += kRowRun) {
      const int64_t end = std::min(begin + kRowRun, r * stride + width);
      multiplier.expect(begin, end);
      Registers<Op, V> even, odd;
      int64_t i = begin;
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        even.add(terms(i, Whole()));
        odd.add(terms(i + kLanes, Whole()));
      }
      if (i + kLanes <= end) {
        even.add(terms(i, Whole()));
        i += kLanes;
      }
      if (i < end) odd.add(terms(i, FirstOf{end - i, readable - i}));
      even.add(odd);
      even.add_to(row_sums[r]);
    }
  }
}

// `width` ≤ kStrip positions of `rows` rows, two rows at a time: twice the independent sums, half
// the traffic to the strip. An odd last row is paired with nothing, that is with zeros.
template <class Op, bool kRows, typename T, class Multiplier>
void run_strip(const T* w, const Multiplier& multiplier, int64_t stride, int64_t rows,
               int64_t width, Sums<Op>* row_sums, Strip<Op, typename Sum<T>::Vector>& strip) {
  using V = typename Sum<T>::Vector;
  const int64_t full = width / kLanes * kLanes;
  Multiplier m0 = multiplier, m1 = multiplier;
  for (int64_t r = 0; r < rows; r += 2) {
    const bool pair = r + 1 < rows;
    const int64_t row0 = r * stride, row1 = row0 + stride;
    Registers<Op, V> sum0, sum1;
    auto step = [&](int64_t i, V a, V b, V c, V d) {
      const Terms<Op, V> t0(a, b), t1(c, d);
      auto& column = strip[i / kLanes];
      for (int m = 0; m < Op::kSums; ++m) {  // one by one: fewer registers than all of a row first
        if (kRows) sum0.of[m] += t0.of[m];
        if (kRows) sum1.of[m] += t1.of[m];
        column.of[m] += t0.of[m] + t1.of[m];
      }
    };
    auto one_row = [&](int64_t i, auto load) {
      const V a = load(w + row0 + i);
      step(i, a, m0.of(a, row0 + i, load), V{}, V{});
    };
    auto two_rows = [&](int64_t i, auto load) {
      const V a = load(w + row0 + i), b = m0.of(a, row0 + i, load);
      const V c = load(w + row1 + i), d = m1.of(c, row1 + i, load);
      step(i, a, b, c, d);
    };
    m0.expect(row0, row0 + width);
    if (pair) {
      m1.expect(row1, row1 + width);
      for (int64_t i = 0; i < full; i += kLanes) {
        // The next two rows: the hardware does not follow from one row to the next. Measured on
        // ResNet-50: 1.0 to 1.4 times the speed without, most where memory is fast.
        __builtin_prefetch(w + row1 + stride + i);
        m1.prefetch(row1 + stride + i);
        __builtin_prefetch(w + row1 + 2 * stride + i);
        m1.prefetch(row1 + 2 * stride + i);
        two_rows(i, Whole());
      }
      if (full < width) two_rows(full, First{width - full});
    } else {
      for (int64_t i = 0; i < full; i += kLanes) one_row(i, Whole());
      if (full < width) one_row(full, First{width - full});
    }
    if (kRows) {
      sum0.add_to(row_sums[r]);
      if (pair) sum1.add_to(row_sums[r + 1]);
    }
  }
}

// A vector (bias, BatchNorm): every row has one element, its own terms.
template <class Op, typename T, class Multiplier>
void run_vector(const T* w, Multiplier multiplier, int64_t rows, typename Sum<T>::Scalar* out) {
  using V = typename Sum<T>::Vector;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const First load{std::min<int64_t>(kLanes, rows - r)};
    multiplier.expect(r, r + load.n);
    const V a = load(w + r);
    const Terms<Op, V> t(a, multiplier.of(a, r, load));
    for (int64_t i = 0; i < load.n; ++i)
      for (int m = 0; m < Op::kSums; ++m) out[(r + i) * Op::kSums + m] = t.of[m][i];
  }
}

}  // namespace TK_ISA
}  // namespace tk

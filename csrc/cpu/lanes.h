// Sixteen lanes in the registers that they take, and the tree that adds lanes up (simd.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Registers that sixteen lanes take.
template <typename S>
constexpr int kRegistersOf = kLanes / Sum<S>::kWidth;

// In how many passes over a run its lanes are summed, so that the accumulators stay in registers:
// `sums` of sixteen lanes each. Six are left for what is added, ten more where there are plenty.
// Which pass sums a lane changes no bit.
template <typename S>
constexpr int passes(int sums) {
  const int most = kRegisters == 32 ? 24 : 10;
  int count = 1;
  while (sums * kRegistersOf<S> > most * count && count < kRegistersOf<S>) count *= 2;
  return count;
}

// Calls body(std::integral_constant<int, i>()) for i = 0 to n - 1; nothing is left of the loop.
template <int n, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, n>());
}

// Sixteen elements from p on, of which the first n count and `readable` may be read, as scalars.
template <typename T>
inline void widen(const T* p, int64_t n, int64_t readable, typename Sum<T>::Scalar* to) {
  for (int i = 0; i < kLanes; i += Sum<T>::kWidth) {
    const auto v = load_first(p + i, n - i, readable - i);
    std::memcpy(to + i, &v, sizeof(v));
  }
}

template <typename S>
struct Quad {
  typedef S Vector __attribute__((vector_size(4 * sizeof(S))));
};
template <typename V>
using QuadOf = typename Quad<typename SumOf<V>::Scalar>::Vector;

using Four = Quad<double>::Vector;
[[gnu::always_inline]] inline void add_four(Four terms, double* totals) {
  Four sum;
  std::memcpy(&sum, totals, sizeof(sum));
  sum += terms;
  std::memcpy(totals, &sum, sizeof(sum));
}

// Lane i with i + 8, then + 4.
template <typename V>
inline QuadOf<V> fold(const V (&v)[kRegistersOf<typename SumOf<V>::Scalar>]) {
  constexpr int kWidth = SumOf<V>::kWidth;
  if constexpr (kWidth == 16) {
    const auto eight = __builtin_shufflevector(v[0], v[0], 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v[0], v[0], 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
           __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  } else if constexpr (kWidth == 8) {
    const V eight = v[0] + v[1];
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
           __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  } else if constexpr (kWidth == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    const V low = (v[0] + v[4]) + (v[2] + v[6]), high = (v[1] + v[5]) + (v[3] + v[7]);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3);
  }
}

// Quads of two registers, as they are named: 0 on are the first's, and after its last the second's.
template <int... quads, typename V>
[[gnu::always_inline]] inline V pick_quads(V first, V second) {
  constexpr int kQuad[] = {quads...};
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(first, second, (4 * kQuad[i / 4] + i % 4)...);
  }(std::make_integer_sequence<int, 4 * sizeof...(quads)>());
}

// fold() of as many rows as a register has quads, side by side: row(r) is a register of the sixteen
// lanes of row r, of two registers already lane i with i + 8. One of two operands is a blend, which
// more ports take than a shuffle: it has the lower lanes of one row and the upper ones of another.
template <class Row>
[[gnu::always_inline]] inline auto fold_together(const Row& row) {
  constexpr int kQuads = sizeof(row(0)) / sizeof(row(0)[0]) / 4;
  if constexpr (kQuads == 2) {
    return pick_quads<0, 3>(row(0), row(1)) + pick_quads<1, 2>(row(0), row(1));
  } else {
    const auto eight = [&](int a, int b) __attribute__((always_inline)) {
      return pick_quads<0, 1, 6, 7>(row(a), row(b)) + pick_quads<2, 3, 4, 5>(row(a), row(b));
    };
    const auto even = eight(0, 2), odd = eight(1, 3);
    return pick_quads<0, 5, 2, 7>(even, odd) + pick_quads<1, 4, 3, 6>(even, odd);
  }
}

// Of every quad of two registers, the lanes that are named: 0 to 3 are the first's, 4 to 7 the
// second's.
template <int... lanes, typename V>
[[gnu::always_inline]] inline V shuffle_quads(V first, V second) {
  constexpr int kWidth = sizeof(V) / sizeof(V{}[0]), kLane[] = {lanes...};
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(first, second,
                                   (i / 4 * 4 + kLane[i % 4] % 4 + kLane[i % 4] / 4 * kWidth)...);
  }(std::make_integer_sequence<int, kWidth>());
}

// Four quads of rows to four of columns: of each place in them use(place, quad).
template <typename V, class Use>
[[gnu::always_inline]] inline void turn(const V (&rows)[4], const Use& use) {
  const V a = shuffle_quads<0, 4, 1, 5>(rows[0], rows[1]);
  const V b = shuffle_quads<0, 4, 1, 5>(rows[2], rows[3]);
  const V c = shuffle_quads<2, 6, 3, 7>(rows[0], rows[1]);
  const V d = shuffle_quads<2, 6, 3, 7>(rows[2], rows[3]);
  use(std::integral_constant<int, 0>(), shuffle_quads<0, 1, 4, 5>(a, b));
  use(std::integral_constant<int, 1>(), shuffle_quads<2, 3, 6, 7>(a, b));
  use(std::integral_constant<int, 2>(), shuffle_quads<0, 1, 4, 5>(c, d));
  use(std::integral_constant<int, 3>(), shuffle_quads<2, 3, 6, 7>(c, d));
}

// The lanes of the quads of `n` ≤ 4 sums added up, + 2 and + 1: sum i comes to lane i % n of its
// quad. quad(i) is a register of quads of sum i, or one. Four sums share their additions, since a
// row may be no longer than this tree.
template <int n, class Quads>
[[gnu::always_inline]] inline auto add_quads(const Quads& quad) {
  auto pair = [&](auto i) __attribute__((always_inline)) {  // lanes 0 + 2 and 1 + 3 of two sums
    constexpr int second = i + 1 < n ? i + 1 : i;
    const auto a = quad(i), b = second == i ? a : quad(std::integral_constant<int, second>());
    return shuffle_quads<0, 1, 4, 5>(a, b) + shuffle_quads<2, 3, 6, 7>(a, b);
  };
  const auto low = pair(std::integral_constant<int, 0>());
  const auto high = [&] {
    if constexpr (n > 2)
      return pair(std::integral_constant<int, 2>());
    else
      return low;
  }();
  return shuffle_quads<0, 2, 4, 6>(low, high) + shuffle_quads<1, 3, 5, 7>(low, high);
}

// Adds the lanes of each of `n` sums to its total, as fold() and add_quads() do.
template <int n, typename V>
inline void add_lanes(const V (&sums)[n][kRegistersOf<typename SumOf<V>::Scalar>], double* totals) {
  unrolled<(n + 3) / 4>([&](auto group) {
    constexpr int at = 4 * group, left = n - at < 4 ? n - at : 4;
    const QuadOf<V> sum = add_quads<left>([&](auto i) { return fold(sums[at + i]); });
    if constexpr (left == 4 && kRegisterBytes >= 32)  // one register of doubles
      add_four(__builtin_convertvector(sum, Four), totals + at);
    else
      for (int i = 0; i < left; ++i) totals[at + i] += static_cast<double>(sum[i]);
  });
}

}  // namespace TK_ISA
}  // namespace tk

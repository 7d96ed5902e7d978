// Rows of at most one run, several at once: of a short row, to add up its lanes and to write its
// sums takes most of the time, and rows that lie in one register share both. The order of a row's
// sums is that of sum_rows (moment_loops.h), to the bit.
//
// A row of at most sixteen elements is one to four quads. Registers hold the same quad of several
// rows; the last one of a row may be a part. A longer row is summed along memory, and its quads
// come together with those of other rows where its lanes are added up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/moment_loops.h"
#include "cpu/row_writer.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

#if defined(__AVX2__)
// A register from as many parts, in their order.
template <typename V>
[[gnu::always_inline]] inline auto join(V a, V b) {
  if constexpr (sizeof(V) == 16)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Ways to read the same quad of several rows, from one row to the next `width` elements: all of it,
// or its first `n` elements and zeros. `number` counts the quads of a row from 0 on. Nothing is
// read that is not the row's.
template <int number, bool kPart>
struct Quads {
  int64_t width, n;

  template <typename T>
  [[gnu::always_inline]] auto operator()(const T* p) const {
    constexpr int kRows = Sum<T>::kWidth / 4;
    if constexpr (sizeof(T) == sizeof(float)) {
      if constexpr (kRows == 2)
        return join(quad(p), quad(p + width));
      else
        return join(join(quad(p), quad(p + width)), join(quad(p + 2 * width), quad(p + 3 * width)));
    } else {
      if constexpr (kRows == 2)
        return widened(_mm_set_epi64x(quad(p + width), quad(p)), T());
      else
        return widened(
            _mm256_set_epi64x(quad(p + 3 * width), quad(p + 2 * width), quad(p + width), quad(p)),
            T());
    }
  }

  template <class At>
  [[gnu::always_inline]] uint32_t bits(int64_t i, const At& at) const {
    uint32_t all = 0;
    for (int row = 0; row < kRegisterBytes / 16; ++row)  // one read for all quads of a row
      all |= (at(i - 4 * number + row * width) >> (4 * number) & 0xf) << (4 * row);
    return all;
  }

 private:
  [[gnu::always_inline]] __m128 quad(const float* p) const {
    if constexpr (!kPart) return _mm_loadu_ps(p);
    const __m128i lane = _mm_setr_epi32(0, 1, 2, 3);
    return _mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(n)), lane));
  }

  // Of a half type, in one word. The quad before a part is the row's too.
  template <typename T>
  [[gnu::always_inline]] int64_t quad(const T* p) const {
    if constexpr (!kPart) return word<uint64_t>(p);
    if constexpr (number > 0) return word<uint64_t>(p + n - 4) >> (64 - 16 * n);
    return word<uint32_t>(p) | static_cast<uint64_t>(word<uint16_t>(p + n - 1)) << (16 * n - 16);
  }

  template <typename Word, typename T>
  static Word word(const T* p) {
    Word bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bits;
  }
};

// Rows of `kQuads` quads, the last of which is a part, or whole. There are at least as many rows as
// a register holds.
template <class Op, int kQuads, bool kPart, typename T, class Multiplier>
[[gnu::noinline]] void sum_short_rows(const Op& op, const T* w, Multiplier& multiplier,
                                      int64_t rows, int64_t width, typename Sum<T>::Scalar* out) {
  using V = typename Sum<T>::Vector;
  constexpr int kRows = Sum<T>::kWidth / 4;
  const RowWriter<Op, typename Sum<T>::Scalar> write(op);
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t first = std::min(row, rows - kRows);  // some rows twice rather than a few apart
    const int64_t begin = first * width;
    multiplier.expect(begin, begin + kRows * width);
    const auto terms = [&](auto quad) __attribute__((always_inline)) {
      const int64_t i = begin + 4 * quad;
      if constexpr (kQuads == 1 && !kPart)
        return terms_at<Op>(w, multiplier, i, Whole());
      else if constexpr (quad + 1 < kQuads || !kPart)
        return terms_at<Op>(w, multiplier, i, Quads<quad, false>{width, 4});
      else
        return terms_at<Op>(w, multiplier, i, Quads<quad, true>{width, width - 4 * quad});
    };
    // As fold() adds them: lane i of a row with i + 8, then + 4.
    V sums[Op::kSums];
    unrolled<std::min(kQuads, 2)>([&](auto half) __attribute__((always_inline)) {
      constexpr std::integral_constant<int, half + 2 < kQuads ? half + 2 : half> other;
      const auto low = terms(half), high = other == half ? low : terms(other);
      // The last sums first: those of factors alone, which are done with before products are made.
      unrolled<Op::kSums>([&](auto index) __attribute__((always_inline)) {
        constexpr std::integral_constant<int, Op::kSums - 1 - index> m;
        V sum = Op::template add<m>(low, V{});
        if constexpr (other != half) sum += Op::template add<m>(high, V{});
        sums[m] = half == 0 ? sum : sums[m] + sum;
      });
    });
    write_quads<Op>(write, [&](auto m) { return sums[m]; }, out + first * columns<Op>());
  }
}

// Rows of more than sixteen elements: each is summed along memory, as many as a register has quads
// are added up and written together. There are at least so many rows.
template <class Op, typename T, class Multiplier>
[[gnu::noinline]] void sum_rows_together(const Op& op, const T* w, Multiplier& multiplier,
                                         int64_t readable, int64_t rows, int64_t width,
                                         typename Sum<T>::Scalar* out) {
  using S = typename Sum<T>::Scalar;
  using V = typename Sum<T>::Vector;
  constexpr int kRows = Sum<T>::kWidth / 4;
  const RowWriter<Op, S> write(op);
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t first = std::min(row, rows - kRows);  // some rows twice rather than a few apart
    V lanes[Op::kSums][kRows];
    for (int r = 0; r < kRows; ++r) {
      V sums[Op::kSums][kRegistersOf<S>];
      const int64_t begin = (first + r) * width;
      sum_run<Op>(w, multiplier, readable, begin, begin + width, sums);
      for (int m = 0; m < Op::kSums; ++m) {
        lanes[m][r] = sums[m][0];
        if constexpr (kRegistersOf<S> == 2) lanes[m][r] += sums[m][1];
      }
    }
    write_quads<Op>(
        write, [&](auto m) { return fold_together([&](int r) { return lanes[m][r]; }); },
        out + first * columns<Op>());
  }
}
#endif

// A vector (bias, BatchNorm): every row has one element, its own terms.
template <class Op, typename T, class Multiplier>
void run_vector(const Op& op, const T* w, Multiplier multiplier, int64_t readable, int64_t rows,
                typename Sum<T>::Scalar* out) {
  using S = typename Sum<T>::Scalar;
  using V = typename Sum<T>::Vector;
  constexpr int kWidth = Sum<T>::kWidth;
  const auto reader = multiplier.from(0);
  [[maybe_unused]] const RowWriter<Op, S> write(op);
  for (int64_t row = 0; row < rows; row += kWidth) {
    // Of more than one register, some rows twice rather than a few apart.
    const int64_t first = rows < kWidth ? 0 : std::min(row, rows - kWidth);
    multiplier.expect(first, std::min<int64_t>(first + kWidth, rows));
    V sums[Op::kSums][1] = {};
    S* to = out + first * columns<Op>();
    if constexpr (kSeveralRows<S> && columns<Op>() > 4) {  // of fewer, lane by lane takes no longer
      if (rows >= kWidth) {
        add_terms<Op>(terms_at<Op>(w, reader, first, Whole()), sums, 0);
        write_turned(write, sums, to);
        continue;
      }
    }
    add_terms<Op>(terms_at<Op>(w, reader, first, First{rows - first, readable - first}), sums, 0);
    for (int64_t i = 0; i < kWidth && first + i < rows; ++i)
      write_row(op, [&](int m) { return sums[m][0][i]; }, to + i * columns<Op>());
  }
}

// Sums rows of `width` elements each where it has a way to sum several at once, and says whether.
template <class Op, typename T, class Multiplier>
bool run_short_rows(const Op& op, const T* w, Multiplier& multiplier, int64_t readable,
                    int64_t rows, int64_t width, typename Sum<T>::Scalar* out) {
  if (width == 1) {
    run_vector(op, w, multiplier, readable, rows, out);
    return true;
  }
#if defined(__AVX2__)
  if constexpr (kSeveralRows<typename Sum<T>::Scalar>) {
    if (width < 1 || width > kRowRun || rows < Sum<T>::kWidth / 4) return false;
    if (width > kLanes) {
      sum_rows_together(op, w, multiplier, readable, rows, width, out);
      return true;
    }
    const auto sum = [&](auto quads, auto part) {
      sum_short_rows<Op, quads, part>(op, w, multiplier, rows, width, out);
    };
    const auto either = [&](auto quads) {
      if (width % 4 == 0)
        sum(quads, std::false_type());
      else
        sum(quads, std::true_type());
    };
    switch ((width + 3) / 4) {
      case 1:
        either(std::integral_constant<int, 1>());
        break;
      case 2:
        either(std::integral_constant<int, 2>());
        break;
      case 3:
        either(std::integral_constant<int, 3>());
        break;
      case 4:
        either(std::integral_constant<int, 4>());
    }
    return true;
  }
#endif
  return false;
}

}  // namespace TK_ISA
}  // namespace tk

// Sums of an op's terms per filter of a list of parameters (parameter.h), on the CPU.
//
// A parameter is a matrix of rows × positions. A task is a block of rows × a tile of positions. Row
// sums stay in registers along a row; column sums stay in a strip of accumulators in L1 while the
// block's rows run past it, and are folded from positions to channels once per block. So the inputs
// are read once for either axis or both.
//
// The op is a struct:
//   kSums                    how many sums a filter has
//   Terms<V>(w, m)           what they are made of, for a register of weights and of multipliers
//   add<i>(terms, sum)       a register of sum i with what these add to it
//   multiplier<T>(item, at)  reads what the weights from element `at` on are multiplied by:
//     expect(begin, end)       the elements that are read next
//     of(w, i, load)           a register of multipliers from i on; w are their weights, load(p)
//     prefetch(i, ask)         calls ask(p) for each p that is read from there
//     from(start)              the same reader with `start` as element 0, in a few words: several
//                              of them stay in registers
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/moment_blocking.h"
#include "cpu/moment_loops.h"
#include "cpu/parallel.h"
#include "cpu/short_rows.h"

namespace tk {
inline namespace TK_ISA {

template <class Op>
struct Scratch {
  std::vector<double> values;
  explicit Scratch(int64_t filters) : values(filters * Op::kSums) {}
  Sums<Op>* get() { return reinterpret_cast<Sums<Op>*>(values.data()); }
  void clear(int64_t filters) { std::fill_n(values.begin(), filters * Op::kSums, 0.0); }
};

// Scratch shared by all threads: the sums of the rows and columns that are merged at present.
template <class Op>
struct Totals {
  Scratch<Op> rows, cols;
};

struct Sizes {
  int64_t rows = 0, cols = 0, tile_cols = 0;
};

template <class Op>
class MomentWorker {
 public:
  MomentWorker(const Op& op, const std::vector<MomentBlocking>& blockings, Totals<Op>& totals,
               const Sizes& sizes)
      : op_(op),
        blocking_(blockings.data()),
        totals_(&totals),
        rows_(sizes.rows),
        cols_(sizes.tile_cols) {}

  void run(int64_t task) {
    const MomentBlocking& blocking = find(task);
    with_element_type(blocking.item.dtype,
                      [&](auto element) { run<typename decltype(element)::type>(blocking, task); });
  }

  int64_t merge_index(int64_t task) {
    const MomentBlocking& blocking = find(task);
    return blocking.merges() ? blocking.first_merge + task - blocking.first_task : -1;
  }

  void merge(int64_t task) {
    const MomentBlocking& blocking = find(task);
    if (blocking.item.dtype == DType::f64)
      merge<double>(blocking, task);
    else
      merge<float>(blocking, task);
  }

 private:
  // Of the parameter that a task belongs to, which is no earlier one than that of the last task.
  const MomentBlocking& find(int64_t task) {
    while (task >= blocking_->end_task()) ++blocking_;
    return *blocking_;
  }

  template <typename T>
  void run(const MomentBlocking& blocking, int64_t task) {
    using S = typename Sum<T>::Scalar;
    const ParameterItem& item = blocking.item;
    const Block block(blocking, task - blocking.first_task);
    const int64_t first = block.row * blocking.positions + block.begin;
    const T* w = static_cast<const T*>(item.weight) + first;
    auto multiplier = op_.template multiplier<T>(item, first);
    const int64_t readable = item.rows * blocking.positions - first;
    if (!item.col_out) {
      S* out = static_cast<S*>(item.row_out) + block.row * columns<Op>();
      if (run_short_rows(op_, w, multiplier, readable, block.rows, blocking.positions, out)) return;
      sum_rows_alone(blocking, block, w, multiplier, readable);
      return;
    }
    if (item.row_out) rows_.clear(block.rows);
    std::tie(first_col_, col_count_) = columns_of(blocking, block);
    cols_.clear(col_count_);
    if (item.row_out)
      sum_columns<T, true>(blocking, block);
    else
      sum_columns<T, false>(blocking, block);
  }

  // Some rows after another: a task of short ones has so many that to clear the sums of them all,
  // and to be given memory for them, would take longer than to sum them.
  template <typename T, class Multiplier>
  void sum_rows_alone(const MomentBlocking& blocking, const Block& block, const T* w,
                      Multiplier& multiplier, int64_t readable) {
    for (int64_t row = 0; row < block.rows; row += kMaxRows) {
      const int64_t rows = std::min(kMaxRows, block.rows - row);
      rows_.clear(rows);
      sum_rows<Op>(w, multiplier, readable, blocking.positions, row, rows, block.end - block.begin,
                   rows_.get());
      if (!blocking.merges())
        write<typename Sum<T>::Scalar>(rows_, rows, blocking.item.row_out, block.row + row);
    }
  }

  template <typename T, bool kRows>
  void sum_columns(const MomentBlocking& blocking, const Block& block) {
    using S = typename Sum<T>::Scalar;
    const ParameterItem& item = blocking.item;
    Strip<Op, S> strip;
    for (int64_t begin = block.begin; begin < block.end; begin += kStrip) {
      const int64_t width = std::min(kStrip, block.end - begin);
      const int64_t first = block.row * blocking.positions + begin;
      std::fill_n(strip.sums[0][0], (width + kLanes - 1) / kLanes * Op::kSums * kLanes, S{});
      run_strip<Op, kRows>(static_cast<const T*>(item.weight) + first,
                           op_.template multiplier<T>(item, first),
                           item.rows * blocking.positions - first, blocking.positions, block.rows,
                           width, rows_.get(), strip);
      fold(item, begin, width, strip);
    }
  }

  // From positions to channels. A channel's positions are added in registers.
  template <typename S>
  void fold(const ParameterItem& item, int64_t begin, int64_t width, const Strip<Op, S>& strip) {
    Sums<Op>* sums = cols_.get() - first_col_;
    // Positions of a channel that lie side by side.
    const int64_t side = item.channels_last ? 1 : item.kernel;
    int64_t channel = begin / side % item.channels;
    if (side == 1) return fold_apart(item.channels, channel, width, strip);
    int64_t end = side - begin % side;
    for (int64_t i = 0; i < width; end += side) {
      double totals[Op::kSums];
      unrolled<Op::kSums>([&](auto m) { totals[m] = sums[channel][m]; });
      for (const int64_t last = std::min(end, width); i < last; ++i)
        unrolled<Op::kSums>([&](auto m) { totals[m] += strip.sums[i / kLanes][m][i % kLanes]; });
      unrolled<Op::kSums>([&](auto m) { sums[channel][m] = totals[m]; });
      if (++channel == item.channels) channel = 0;
    }
  }

  // The same where neighbours belong to different channels, from `channel` on: four positions of
  // four sums are turned into four sums of each position, and added at once.
  template <typename S>
  void fold_apart(int64_t channels, int64_t channel, int64_t width, const Strip<Op, S>& strip) {
    constexpr int kFours = Op::kSums / 4 * 4;
    Sums<Op>* sums = cols_.get() - first_col_;
    for (int64_t i = 0; i < width;) {
      const auto& from = strip.sums[i / kLanes];
      const int64_t at = i % kLanes;
      if (kFours && at % 4 == 0 && i + 4 <= width && channel + 4 <= channels) {
        unrolled<kFours / 4>([&](auto group) {
          typename Quad<S>::Vector q[4];
          for (int m = 0; m < 4; ++m) std::memcpy(&q[m], from[4 * group + m] + at, sizeof(q[m]));
          turn(q, [&](auto k, auto four) {
            add_four(__builtin_convertvector(four, Four), sums[channel + k] + 4 * group);
          });
        });
        for (int k = 0; k < 4; ++k)
          for (int m = kFours; m < Op::kSums; ++m) sums[channel + k][m] += from[m][at + k];
        i += 4;
        channel += 4;
      } else {
        unrolled<Op::kSums>([&](auto m) { sums[channel][m] += from[m][at]; });
        ++i;
        ++channel;
      }
      if (channel == channels) channel = 0;
    }
  }

  static std::pair<int64_t, int64_t> columns_of(const MomentBlocking& blocking,
                                                const Block& block) {
    if (blocking.item.channels_last) return {0, blocking.item.channels};
    const int64_t first = block.begin / blocking.item.kernel;
    return {first, (block.end - 1) / blocking.item.kernel + 1 - first};
  }

  template <typename S>
  void merge(const MomentBlocking& blocking, int64_t task) {
    const ParameterItem& item = blocking.item;
    const Block block(blocking, task - blocking.first_task);
    // What one task sums alone is written from where it lies.
    if (item.row_out && blocking.tiles == 1) {
      write<S>(rows_, block.rows, item.row_out, block.row);
    } else if (item.row_out) {
      if (block.first_tile) totals_->rows.clear(block.rows);
      add(rows_.get(), block.rows, totals_->rows.get());
      if (block.last_tile) write<S>(totals_->rows, block.rows, item.row_out, block.row);
    }
    if (!item.col_out) return;
    if (block.first_of_group && block.last_of_group)
      return write<S>(cols_, item.channels, item.col_out, block.group * item.channels);
    if (block.first_of_group) totals_->cols.clear(item.channels);
    add(cols_.get(), col_count_, totals_->cols.get() + first_col_);
    if (block.last_of_group)
      write<S>(totals_->cols, item.channels, item.col_out, block.group * item.channels);
  }

  static void add(const Sums<Op>* from, int64_t count, Sums<Op>* to) {
    for (int64_t i = 0; i < count; ++i)
      for (int m = 0; m < Op::kSums; ++m) to[i][m] += from[i][m];
  }

  template <typename S>
  void write(const Scratch<Op>& sums, int64_t filters, void* out, int64_t first) const {
    const double* from = sums.values.data();
    S* row = static_cast<S*>(out) + first * columns<Op>();
    if (wants_all(op_)) {  // in most calls: conversions alone, several at once
      for (int64_t i = 0; i < filters * Op::kSums; ++i) row[i] = static_cast<S>(from[i]);
      return;
    }
    for (int64_t f = 0; f < filters; ++f, from += Op::kSums, row += columns<Op>())
      write_row(op_, [from](int m) { return static_cast<S>(from[m]); }, row);
  }

  Op op_;
  const MomentBlocking* blocking_;
  Totals<Op>* totals_;
  Scratch<Op> rows_, cols_;
  int64_t first_col_ = 0, col_count_ = 0;
};

template <class Op>
void sum_moments(const Op& op, const std::vector<ParameterItem>& items, int threads) {
  std::vector<MomentBlocking> blockings;
  blockings.reserve(items.size());
  Sizes sizes;
  int64_t tasks = 0, merges = 0, elements = 0;
  for (const ParameterItem& item : items) {
    const MomentBlocking& blocking = blockings.emplace_back(item, tasks, merges);
    tasks = blocking.end_task();
    merges = blocking.end_merge();
    elements += blocking.item.rows * blocking.positions;
    if (blocking.item.row_out)
      sizes.rows = std::max(sizes.rows, std::min(blocking.block_rows, kMaxRows));
    if (blocking.item.col_out) {
      sizes.cols = std::max(sizes.cols, blocking.item.channels);
      const int64_t in_tile = blocking.item.channels_last ? blocking.item.channels : kTile;
      sizes.tile_cols = std::max(sizes.tile_cols, std::min(blocking.item.channels, in_tile));
    }
  }
  Totals<Op> totals{Scratch<Op>(sizes.rows), Scratch<Op>(sizes.cols)};
  threads = static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1));
  ordered_tasks(tasks, threads, [&] { return MomentWorker<Op>(op, blockings, totals, sizes); });
}

}  // namespace TK_ISA
}  // namespace tk

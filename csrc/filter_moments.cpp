// The CPU kernel of filter_moments; formula and layouts: filter_moments.h. Compiled once per
// instruction set (TK_ISA); cpu_dispatch.cpp picks one at run time.
//
// A parameter is a matrix of rows × positions (position = channel and kernel element as stored).
// A task is a block of rows × a tile of positions. Row sums stay in registers along a row; column
// sums stay in a strip of accumulators in L1 while the block's rows run past it, and are folded
// from positions to channels once per block. So w and g are read once for either axis or both.
#include "filter_moments.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kStrip = 512;               // positions whose column sums fit L1: 10 KB
constexpr int64_t kTile = 16 * kStrip;        // most positions of a task with column sums
constexpr int64_t kRowRun = 4096;             // elements of a row summed in float before double
constexpr int64_t kTaskElements = 131072;     // 1 MB of w and g: 20 µs, many times a commit
constexpr int64_t kMinRows = 64;              // spreads the folding of a strip over enough rows
constexpr int64_t kMaxRows = 512;             // bounds the float sum down a column
constexpr int64_t kMaxRowSums = 4096;         // bounds the scratch of a task that sums rows only
constexpr int64_t kThreadElements = 1 << 18;  // under 100 µs of work a second thread costs more

using Sums = double[kMoments];

// How one item is cut into tasks: groups, then blocks of rows, then tiles. It depends on the
// item's shape alone, and with it every order of summation.
struct Plan {
  FilterMomentsItem item;
  int64_t first_task, first_turn, positions, groups, group_rows, block_rows, blocks, tile, tiles;

  Plan(const FilterMomentsItem& it, int64_t task, int64_t turn)
      : item(it), first_task(task), first_turn(turn) {
    positions = item.channels * item.kernel;
    groups = item.col_out ? item.groups : 1;
    group_rows = item.rows / groups;
    int64_t rows = kTaskElements / positions;
    block_rows = std::min(group_rows, item.col_out ? std::clamp(rows, kMinRows, kMaxRows)
                                                   : std::clamp(rows, int64_t{1}, kMaxRowSums));
    blocks = (group_rows + block_rows - 1) / block_rows;
    tile = item.col_out ? kTile : kTaskElements;
    tiles = (positions + tile - 1) / tile;
    // Tiles of about one size: a narrow last one would read little of each row.
    const int64_t strips = (positions + kStrip - 1) / kStrip;
    tile = (strips + tiles - 1) / tiles * kStrip;
  }

  int64_t end_task() const { return first_task + groups * blocks * tiles; }
  // Rows that end in the task that began them are written by it.
  bool commits() const { return item.col_out || tiles > 1; }
  int64_t end_turn() const { return commits() ? first_turn + groups * blocks * tiles : first_turn; }
};

struct Block {
  int64_t group, row, rows, begin, end;
  bool first_tile, last_tile, first_of_group, last_of_group;

  Block(const Plan& plan, int64_t task) {
    const int64_t tile = task % plan.tiles;
    const int64_t block = task / plan.tiles % plan.blocks;
    group = task / plan.tiles / plan.blocks;
    row = group * plan.group_rows + block * plan.block_rows;
    rows = std::min(plan.block_rows, (group + 1) * plan.group_rows - row);
    begin = tile * plan.tile;
    end = std::min(begin + plan.tile, plan.positions);
    first_tile = tile == 0;
    last_tile = tile == plan.tiles - 1;
    first_of_group = first_tile && block == 0;
    last_of_group = last_tile && block == plan.blocks - 1;
  }
};

// The terms of the five moments for one vector of elements.
template <typename V>
struct Terms {
  V gw, gw2, abs_gw, w2, g2;
  Terms(V w, V g) : gw(g * w), gw2(gw * gw), abs_gw(abs(gw)), w2(w * w), g2(g * g) {}
};

template <typename V>
struct Registers {
  V gw = {}, gw2 = {}, abs_gw = {}, w2 = {}, g2 = {};
  void add(const Terms<V>& a, const Terms<V>& b) {
    gw += a.gw + b.gw;
    gw2 += a.gw2 + b.gw2;
    abs_gw += a.abs_gw + b.abs_gw;
    w2 += a.w2 + b.w2;
    g2 += a.g2 + b.g2;
  }
  void add(const Terms<V>& t) {
    gw += t.gw;
    gw2 += t.gw2;
    abs_gw += t.abs_gw;
    w2 += t.w2;
    g2 += t.g2;
  }
  void add(const Registers& other) {
    gw += other.gw;
    gw2 += other.gw2;
    abs_gw += other.abs_gw;
    w2 += other.w2;
    g2 += other.g2;
  }
  void add_to(Sums& sums) const {
    sums[0] += sum_lanes(gw);
    sums[1] += sum_lanes(gw2);
    sums[2] += sum_lanes(abs_gw);
    sums[3] += sum_lanes(w2);
    sums[4] += sum_lanes(g2);
  }
};

// Column sums, the five of a vector of positions side by side: five arrays 4 KB apart would share
// their cache sets with each other and with rows of a power-of-two length.
template <typename V>
using Strip = Registers<V>[kStrip / kLanes];

// Row sums alone, of `width` positions of each row: along memory, two vectors at a time. From w and
// g on, `readable` elements may be read.
template <typename T>
void sum_rows(const T* w, const T* g, int64_t readable, int64_t stride, int64_t rows, int64_t width,
              Sums* row_sums) {
  using V = typename Sum<T>::Vector;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = r * stride; begin < r * stride + width; begin += kRowRun) {
      const int64_t end = std::min(begin + kRowRun, r * stride + width);
      Registers<V> even, odd;
      int64_t i = begin;
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        even.add(Terms<V>(load(w + i), load(g + i)));
        odd.add(Terms<V>(load(w + i + kLanes), load(g + i + kLanes)));
      }
      if (i + kLanes <= end) {
        even.add(Terms<V>(load(w + i), load(g + i)));
        i += kLanes;
      }
      if (i < end)
        odd.add(Terms<V>(load_first(w + i, end - i, readable - i),
                         load_first(g + i, end - i, readable - i)));
      even.add(odd);
      even.add_to(row_sums[r]);
    }
  }
}

// `width` ≤ kStrip positions of `rows` rows, two rows at a time: twice the independent sums, half
// the traffic to the strip. An odd last row is paired with nothing, that is with zeros.
template <typename T, bool kRows>
void run_strip(const T* w, const T* g, int64_t stride, int64_t rows, int64_t width, Sums* row_sums,
               Strip<typename Sum<T>::Vector>& strip) {
  using V = typename Sum<T>::Vector;
  const int64_t full = width / kLanes * kLanes;
  for (int64_t r = 0; r < rows; r += 2) {
    const bool pair = r + 1 < rows;
    const T* w0 = w + r * stride;
    const T* g0 = g + r * stride;
    const T* w1 = w0 + stride;
    const T* g1 = g0 + stride;
    Registers<V> sum0, sum1;
    auto step = [&](int64_t at, V a, V b, V c, V d) {
      const Terms<V> t0(a, b), t1(c, d);
      if (kRows) sum0.add(t0);
      if (kRows) sum1.add(t1);
      strip[at / kLanes].add(t0, t1);
    };
    if (pair) {
      for (int64_t i = 0; i < full; i += kLanes) {
        // The next two rows: the hardware does not follow from one row to the next. Measured on
        // ResNet-50: 1.0 to 1.4 times the speed without, most where memory is fast.
        __builtin_prefetch(w1 + stride + i);
        __builtin_prefetch(g1 + stride + i);
        __builtin_prefetch(w1 + 2 * stride + i);
        __builtin_prefetch(g1 + 2 * stride + i);
        step(i, load(w0 + i), load(g0 + i), load(w1 + i), load(g1 + i));
      }
    } else {
      for (int64_t i = 0; i < full; i += kLanes) step(i, load(w0 + i), load(g0 + i), V{}, V{});
    }
    if (full < width) {
      const int64_t rest = width - full;
      step(full, load_first(w0 + full, rest), load_first(g0 + full, rest),
           pair ? load_first(w1 + full, rest) : V{}, pair ? load_first(g1 + full, rest) : V{});
    }
    if (kRows) {
      sum0.add_to(row_sums[r]);
      if (pair) sum1.add_to(row_sums[r + 1]);
    }
  }
}

// A vector (bias, BatchNorm): every row has one element, its own term.
template <typename T>
void run_vector(const T* w, const T* g, int64_t rows, typename Sum<T>::Scalar* out) {
  using S = typename Sum<T>::Scalar;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, rows - r);
    const Terms<typename Sum<T>::Vector> t(load_first(w + r, n), load_first(g + r, n));
    for (int64_t i = 0; i < n; ++i) {
      const S terms[kMoments] = {t.gw[i], t.gw2[i], t.abs_gw[i], t.w2[i], t.g2[i]};
      std::copy_n(terms, kMoments, out + (r + i) * kMoments);
    }
  }
}

void add(const Sums* from, int64_t count, Sums* to) {
  for (int64_t i = 0; i < count; ++i)
    for (int m = 0; m < kMoments; ++m) to[i][m] += from[i][m];
}

struct Scratch {
  std::vector<double> values;
  explicit Scratch(int64_t filters) : values(filters * kMoments) {}
  Sums* get() { return reinterpret_cast<Sums*>(values.data()); }
  void clear(int64_t filters) { std::fill_n(values.begin(), filters * kMoments, 0.0); }
};

// Scratch shared by all threads: whole sums of the rows and columns being committed.
struct Totals {
  Scratch rows, cols;
};

struct Sizes {
  int64_t rows = 0, cols = 0, tile_cols = 0;
};

class Worker {
 public:
  Worker(const std::vector<Plan>& plans, Totals& totals, const Sizes& sizes)
      : plans_(&plans), totals_(&totals), rows_(sizes.rows), cols_(sizes.tile_cols) {}

  void run(int64_t task) {
    const Plan& plan = find(task);
    switch (plan.item.dtype) {
      case DType::f32:
        return run<float>(plan, task);
      case DType::f16:
        return run<Half>(plan, task);
      case DType::bf16:
        return run<BFloat16>(plan, task);
      case DType::f64:
        return run<double>(plan, task);
    }
  }

  int64_t turn(int64_t task) const {
    const Plan& plan = find(task);
    return plan.commits() ? plan.first_turn + task - plan.first_task : -1;
  }

  void commit(int64_t task) {
    const Plan& plan = find(task);
    if (plan.item.dtype == DType::f64)
      commit<double>(plan, task);
    else
      commit<float>(plan, task);
  }

 private:
  const Plan& find(int64_t task) const {
    auto after = [](int64_t t, const Plan& plan) { return t < plan.first_task; };
    return *(std::upper_bound(plans_->begin(), plans_->end(), task, after) - 1);
  }

  template <typename T>
  void run(const Plan& plan, int64_t task) {
    const FilterMomentsItem& item = plan.item;
    const Block block(plan, task - plan.first_task);
    if (plan.positions == 1 && !item.col_out) {
      using S = typename Sum<T>::Scalar;
      return run_vector(static_cast<const T*>(item.w) + block.row,
                        static_cast<const T*>(item.g) + block.row, block.rows,
                        static_cast<S*>(item.row_out) + block.row * kMoments);
    }
    if (item.row_out) rows_.clear(block.rows);
    if (item.col_out) {
      std::tie(first_col_, col_count_) = columns_of(plan, block);
      cols_.clear(col_count_);
    }
    const T* w = static_cast<const T*>(item.w) + block.row * plan.positions;
    const T* g = static_cast<const T*>(item.g) + block.row * plan.positions;
    if (!item.col_out) {
      const int64_t readable = (item.rows - block.row) * plan.positions - block.begin;
      sum_rows(w + block.begin, g + block.begin, readable, plan.positions, block.rows,
               block.end - block.begin, rows_.get());
      if (!plan.commits())
        write<typename Sum<T>::Scalar>(rows_, block.rows, item.row_out, block.row);
    } else if (item.row_out)
      sum_columns<T, true>(plan, block, w, g);
    else
      sum_columns<T, false>(plan, block, w, g);
  }

  template <typename T, bool kRows>
  void sum_columns(const Plan& plan, const Block& block, const T* w, const T* g) {
    using V = typename Sum<T>::Vector;
    Strip<V> strip;
    for (int64_t begin = block.begin; begin < block.end; begin += kStrip) {
      const int64_t width = std::min(kStrip, block.end - begin);
      std::fill_n(strip, (width + kLanes - 1) / kLanes, Registers<V>());
      run_strip<T, kRows>(w + begin, g + begin, plan.positions, block.rows, width, rows_.get(),
                          strip);
      fold(plan.item, begin, width, strip);
    }
  }

  // From positions to channels.
  template <typename V>
  void fold(const FilterMomentsItem& item, int64_t begin, int64_t width, const Strip<V>& strip) {
    Sums* sums = cols_.get() - first_col_;
    int64_t channel = item.channels_last ? begin % item.channels : begin / item.kernel;
    int64_t element = begin % item.kernel;
    for (int64_t i = 0; i < width; ++i) {
      const Registers<V>& column = strip[i / kLanes];
      const int lane = i % kLanes;
      sums[channel][0] += column.gw[lane];
      sums[channel][1] += column.gw2[lane];
      sums[channel][2] += column.abs_gw[lane];
      sums[channel][3] += column.w2[lane];
      sums[channel][4] += column.g2[lane];
      if (item.channels_last)
        channel = channel + 1 == item.channels ? 0 : channel + 1;
      else if (++element == item.kernel)
        element = 0, ++channel;
    }
  }

  static std::pair<int64_t, int64_t> columns_of(const Plan& plan, const Block& block) {
    if (plan.item.channels_last) return {0, plan.item.channels};
    const int64_t first = block.begin / plan.item.kernel;
    return {first, (block.end - 1) / plan.item.kernel + 1 - first};
  }

  template <typename S>
  void commit(const Plan& plan, int64_t task) {
    const FilterMomentsItem& item = plan.item;
    const Block block(plan, task - plan.first_task);
    if (item.row_out) {
      if (block.first_tile) totals_->rows.clear(block.rows);
      add(rows_.get(), block.rows, totals_->rows.get());
      if (block.last_tile) write<S>(totals_->rows, block.rows, item.row_out, block.row);
    }
    if (item.col_out) {
      if (block.first_of_group) totals_->cols.clear(item.channels);
      add(cols_.get(), col_count_, totals_->cols.get() + first_col_);
      if (block.last_of_group)
        write<S>(totals_->cols, item.channels, item.col_out, block.group * item.channels);
    }
  }

  template <typename S>
  static void write(const Scratch& sums, int64_t filters, void* out, int64_t first) {
    std::copy_n(sums.values.begin(), filters * kMoments, static_cast<S*>(out) + first * kMoments);
  }

  const std::vector<Plan>* plans_;
  Totals* totals_;
  Scratch rows_, cols_;
  int64_t first_col_ = 0, col_count_ = 0;
};

}  // namespace

void filter_moments(const FilterMomentsItem* items, int64_t count, int threads) {
  std::vector<Plan> plans;
  plans.reserve(count);
  Sizes sizes;
  int64_t tasks = 0, turns = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Plan& plan = plans.emplace_back(items[i], tasks, turns);
    tasks = plan.end_task();
    turns = plan.end_turn();
    elements += plan.item.rows * plan.positions;
    if (plan.item.row_out) sizes.rows = std::max(sizes.rows, plan.block_rows);
    if (plan.item.col_out) {
      sizes.cols = std::max(sizes.cols, plan.item.channels);
      const int64_t in_tile = plan.item.channels_last ? plan.item.channels : kTile;
      sizes.tile_cols = std::max(sizes.tile_cols, std::min(plan.item.channels, in_tile));
    }
  }
  Totals totals{Scratch(sizes.rows), Scratch(sizes.cols)};
  threads = static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1));
  ordered_tasks(tasks, threads, [&] { return Worker(plans, totals, sizes); });
}

}  // namespace TK_ISA
}  // namespace tk

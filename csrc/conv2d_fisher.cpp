// The CPU kernel of conv2d_fisher; formula and layouts: conv2d_fisher.h. Compiled once per
// instruction set (TK_ISA); cpu_dispatch.cpp picks one at run time.
#include "conv2d_fisher.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "conv2d_fisher_panels.h"
#include "conv2d_fisher_tile.h"
#include "cpu_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kPanelBytes = 4 << 20;      // of a chunk of examples
constexpr int64_t kTileBytes = 32 << 10;      // of panels that stay in L1 while taps run over them
constexpr int64_t kMaxChunk = 256;            // examples whose squares are summed in a float
constexpr int64_t kMaxRun = 512;              // columns of an image summed in a float
constexpr int64_t kTiles = kLanes;            // tiles of sums that a task keeps: 16 KB
constexpr int64_t kSlots = 16;                // most partial sums of a filter
constexpr int64_t kMinTasks = 64;             // spread over threads
constexpr int64_t kPackElements = 1 << 14;    // of a task that packs
constexpr int64_t kThreadProducts = 4 << 20;  // under 100 µs of work a second thread costs more

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// The outputs along one axis for which a tap lies inside of the image.
Range inside(int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t extent,
             int64_t outputs) {
  const int64_t shift = pad - tap * dilation;  // input = output · stride − shift
  return intersect({0, outputs}, {shift > 0 ? ceil_div(shift, stride) : 0,
                                  extent + shift > 0 ? ceil_div(extent + shift, stride) : 0});
}

// Which factor's channels are lanes, and the tile's size.
struct Mapping {
  bool filters_in_lanes, lanewise;
  int64_t rows, vectors;
  int64_t cost;  // half cycles per position, at two loads and two multiply-adds a cycle
};

template <typename S>
Mapping choose(const Conv2dFisherArgs& args) {
  constexpr int64_t kWidth = Register<S>::kWidth;
  auto even = [](int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, most)); };
  Mapping best = {false, false, 0, 0, INT64_MAX};
  auto consider = [&](bool filters_in_lanes, bool lanewise, int64_t rows, int64_t vectors,
                      int64_t blocks) {
    const int64_t cost = blocks * std::max(rows * vectors, rows + vectors);
    if (cost < best.cost) best = {filters_in_lanes, lanewise, rows, vectors, cost};
  };
  for (bool filters_in_lanes : {false, true}) {
    const int64_t in_lanes = filters_in_lanes ? args.filters : args.channels;
    const int64_t in_rows = filters_in_lanes ? args.channels : args.filters;
    const int64_t rows = even(in_rows, kMaxRows);
    for (int64_t vectors = kMaxVectors; vectors > 0; --vectors)
      consider(filters_in_lanes, false, rows, vectors,
               args.groups * ceil_div(in_rows, rows) * ceil_div(in_lanes, vectors * kWidth));
  }
  const int64_t rows = even(args.filters, kMaxLanewiseRows);
  const int64_t vectors = even(args.channels, kMaxVectors);
  consider(false, true, rows, vectors,
           ceil_div(args.groups, kWidth) * ceil_div(args.filters, rows) *
               ceil_div(args.channels, vectors));
  return best;
}

template <typename S>
struct Plan {
  Conv2dFisherArgs args;
  Mapping mapping;
  Factor a, b;  // rows and lanes
  SumTile<S> sum_tile;
  int64_t gangs, taps, live;
  int64_t tile_size;                // elements of sums
  int64_t chunk, tile_examples;     // examples
  int64_t band_rows, band_columns;  // of output; rows 0: whole examples
  int64_t task_taps, tap_splits;
  int64_t task_rows, row_groups;    // blocks of rows
  int64_t task_lanes, lane_groups;  // blocks of lanes

  explicit Plan(const Conv2dFisherArgs& arguments) : args(arguments), mapping(choose<S>(args)) {
    constexpr int64_t kWidth = Register<S>::kWidth;
    const bool lanewise = mapping.lanewise;
    const int64_t lanes = lanewise ? kWidth : 1;
    auto factor = [&](bool filters, int64_t rows) {
      const int64_t channels = filters ? args.filters : args.channels;
      Factor f = {filters ? args.dy : args.x,
                  static_cast<bool>(filters ? args.dy_channels_last : args.x_channels_last),
                  args.batch,
                  args.groups,
                  channels,
                  filters ? args.out_height : args.height,
                  filters ? args.out_width : args.width,
                  lanewise,
                  lanes,
                  rows,
                  ceil_div(channels, rows)};
      return f;
    };
    a = factor(!mapping.filters_in_lanes, mapping.rows);
    b = factor(mapping.filters_in_lanes, lanewise ? mapping.vectors : mapping.vectors * kWidth);
    sum_tile = sum_tile_of<S>(mapping.rows, mapping.vectors, lanewise);
    gangs = ceil_div(args.groups, lanes);
    taps = args.kernel_h * args.kernel_w;
    tile_size = mapping.rows * mapping.vectors * kWidth;

    const int64_t example = gangs * (a.blocks * a.panel_size() + b.blocks * b.panel_size());
    chunk =
        std::clamp<int64_t>(kPanelBytes / sizeof(S) / example, 1, std::min(args.batch, kMaxChunk));
    chunk = ceil_div(args.batch, ceil_div(args.batch, chunk));

    const int64_t tile_elements = kTileBytes / sizeof(S);
    tile_examples = tile_elements / (a.panel_size() + b.panel_size());
    const Factor& x = mapping.filters_in_lanes ? a : b;
    const Factor& dy = mapping.filters_in_lanes ? b : a;
    const int64_t row = dy.width * dy.panel_width() + args.stride_h * x.width * x.panel_width();
    band_rows = std::clamp<int64_t>(tile_elements / row, 1, args.out_height);
    band_columns = std::min(args.out_width, kMaxRun);

    task_taps = ceil_div(taps, ceil_div(taps, kTiles));
    tap_splits = ceil_div(taps, task_taps);
    task_rows = std::clamp<int64_t>(gangs * a.blocks * b.blocks * tap_splits / kMinTasks, 1,
                                    kTiles / task_taps);
    row_groups = ceil_div(a.blocks, task_rows);
    task_lanes = 1;
    if (!mapping.filters_in_lanes)
      task_lanes = ceil_div(b.blocks, std::max<int64_t>(kSlots / tap_splits, 1));
    lane_groups = ceil_div(b.blocks, task_lanes);
  }

  int64_t slots() const {
    return tap_splits * (mapping.filters_in_lanes ? row_groups : lane_groups);
  }
  int64_t panels(const Factor& f) const { return gangs * f.blocks; }
  int64_t a_elements() const { return panels(a) * chunk * a.panel_size(); }
  int64_t b_elements() const { return panels(b) * chunk * b.panel_size(); }
  int64_t tasks() const { return gangs * lane_groups * row_groups * tap_splits; }
};

// Panels of a chunk: [gang][block][example][position][width], of a and of b.
template <typename T>
class Packer {
 public:
  using S = typename Sum<T>::Scalar;

  Packer(const Plan<S>& plan, S* a, S* b, int64_t first, int64_t examples)
      : plan_(&plan), a_(a), b_(b), first_(first), examples_(examples) {}

  // A task is some examples of a panel of one factor.
  static int64_t task_examples(const Factor& f) {
    return std::max<int64_t>(kPackElements / f.panel_size(), 1);
  }
  static int64_t tasks(const Plan<S>& plan, const Factor& f, int64_t examples) {
    return plan.panels(f) * ceil_div(examples, task_examples(f));
  }

  void run(int64_t task) {
    const int64_t of_a = tasks(*plan_, plan_->a, examples_);
    if (task < of_a)
      pack_some(plan_->a, a_, task);
    else
      pack_some(plan_->b, b_, task - of_a);
  }

  int64_t turn(int64_t) const { return -1; }
  void commit(int64_t) {}

 private:
  void pack_some(const Factor& f, S* panels, int64_t task) {
    const int64_t step = task_examples(f), parts = ceil_div(examples_, step);
    const int64_t panel = task / parts, begin = task % parts * step;
    for (int64_t n = begin; n < std::min(begin + step, examples_); ++n)
      pack<T>(f, first_ + n, panel / f.blocks * f.lanes, panel % f.blocks,
              panels + (panel * plan_->chunk + n) * f.panel_size());
  }

  const Plan<S>* plan_;
  S *a_, *b_;
  int64_t first_, examples_;
};

template <typename T>
class Summer {
 public:
  using S = typename Sum<T>::Scalar;

  Summer(const Plan<S>& plan, const S* a, const S* b, double* partials, int64_t first,
         int64_t examples)
      : plan_(&plan), a_(a), b_(b), partials_(partials), first_(first), examples_(examples) {
    sums_.resize(kTiles * plan.tile_size + kLanes);
    gradients_.resize(kTiles * plan.tile_size);
    run_.resize((plan.b.panel_width() + 1) * kTiles + kLanes);
  }

  void run(int64_t task) {
    const Plan<S>& p = *plan_;
    auto next = [&](int64_t count) {
      const int64_t index = task % count;
      task /= count;
      return index;
    };
    const int64_t split = next(p.tap_splits);
    taps_ = {split * p.task_taps, std::min((split + 1) * p.task_taps, p.taps)};
    const int64_t row_group = next(p.row_groups);
    rows_ = {row_group * p.task_rows, std::min((row_group + 1) * p.task_rows, p.a.blocks)};
    const int64_t lane_group = next(p.lane_groups);
    gang_ = task;
    slot_ = (p.mapping.filters_in_lanes ? row_group : lane_group) * p.tap_splits + split;
    const int64_t end = std::min((lane_group + 1) * p.task_lanes, p.b.blocks);
    for (lanes_ = lane_group * p.task_lanes; lanes_ < end; ++lanes_) {
      std::fill(sums_.begin(), sums_.end(), S(0));
      if (p.tile_examples > 0)
        for (int64_t n = 0; n < examples_; n += p.tile_examples)
          sum_examples(n, std::min(p.tile_examples, examples_ - n));
      else
        for (int64_t n = 0; n < examples_; ++n) sum_bands(n);
      write();
    }
  }

  int64_t turn(int64_t) const { return -1; }
  void commit(int64_t) {}

 private:
  void sum_examples(int64_t n, int64_t count) {
    const Range rows = {0, plan_->args.out_height}, columns = {0, plan_->args.out_width};
    for (int64_t r = rows_.begin; r < rows_.end; ++r)
      for (int64_t t = taps_.begin; t < taps_.end; ++t)
        sum_tap(n, count, rows, columns, r, t, true, sums_);
  }

  void sum_bands(int64_t n) {
    const Plan<S>& p = *plan_;
    std::fill(gradients_.begin(), gradients_.end(), S(0));
    for (int64_t h = 0; h < p.args.out_height; h += p.band_rows)
      for (int64_t w = 0; w < p.args.out_width; w += p.band_columns)
        for (int64_t r = rows_.begin; r < rows_.end; ++r)
          for (int64_t t = taps_.begin; t < taps_.end; ++t)
            sum_tap(n, 1, {h, h + p.band_rows}, {w, w + p.band_columns}, r, t, false, gradients_);
    for (size_t i = 0; i < gradients_.size(); ++i) sums_[i] += gradients_[i] * gradients_[i];
  }

  // The products of a block of rows at one tap, over the outputs of a window.
  void sum_tap(int64_t n, int64_t count, Range window_rows, Range window_columns, int64_t row_block,
               int64_t tap, bool square, std::vector<S>& to) {
    const Plan<S>& p = *plan_;
    const Conv2dFisherArgs& g = p.args;
    const int64_t i = tap / g.kernel_w, j = tap % g.kernel_w;
    const Range rows = intersect(
        window_rows, inside(i, g.stride_h, g.pad_h, g.dilation_h, g.height, g.out_height));
    const Range columns = intersect(
        window_columns, inside(j, g.stride_w, g.pad_w, g.dilation_w, g.width, g.out_width));
    if (rows.begin >= rows.end || columns.begin >= columns.end) return;
    const S* a = a_ + ((gang_ * p.a.blocks + row_block) * p.chunk + n) * p.a.panel_size();
    const S* b = b_ + ((gang_ * p.b.blocks + lanes_) * p.chunk + n) * p.b.panel_size();
    const int64_t y = rows.begin, z = columns.begin;
    const int64_t x_at = (y * g.stride_h - g.pad_h + i * g.dilation_h) * g.width + z * g.stride_w -
                         g.pad_w + j * g.dilation_w;
    const int64_t dy_at = y * g.out_width + z;
    const bool swapped = p.mapping.filters_in_lanes;
    const int64_t aw = p.a.panel_width(), bw = p.b.panel_width();
    Walk walk = {count,
                 rows.end - rows.begin,
                 columns.end - columns.begin,
                 p.a.panel_size(),
                 swapped ? g.stride_h * g.width * aw : g.out_width * aw,
                 swapped ? g.stride_w * aw : aw,
                 p.b.panel_size(),
                 swapped ? g.out_width * bw : g.stride_h * g.width * bw,
                 swapped ? bw : g.stride_w * bw};
    if (walk.a_row == walk.columns * walk.a_column && walk.b_row == walk.columns * walk.b_column) {
      walk.columns *= walk.rows;
      walk.rows = 1;
    }
    p.sum_tile(a + (swapped ? x_at : dy_at) * aw, b + (swapped ? dy_at : x_at) * bw, walk, square,
               tile(to, row_block, tap));
  }

  S* tile(std::vector<S>& tiles, int64_t row_block, int64_t tap) const {
    return tiles.data() +
           ((row_block - rows_.begin) * plan_->task_taps + tap - taps_.begin) * plan_->tile_size;
  }

  // From tiles to filters.
  void write() {
    const Plan<S>& p = *plan_;
    const Conv2dFisherArgs& g = p.args;
    constexpr int64_t kWidth = Register<S>::kWidth;
    const int64_t lane_width = p.mapping.vectors * kWidth;
    for (int64_t r = rows_.begin; r < rows_.end; ++r) {
      const int64_t row = r * p.a.rows, rows = std::min(p.a.rows, p.a.channels - row);
      const int64_t lane = lanes_ * p.b.rows, lanes = std::min(p.b.rows, p.b.channels - lane);
      if (p.mapping.lanewise) {
        const int64_t group = gang_ * kWidth;
        for (int64_t l = 0; l < std::min(kWidth, g.groups - group); ++l)
          for (int64_t o = 0; o < rows; ++o)
            write_filter((group + l) * g.filters + row + o, lane, lanes, r, o * lane_width + l,
                         kWidth);
      } else if (p.mapping.filters_in_lanes) {
        for (int64_t o = 0; o < lanes; ++o)
          write_filter(gang_ * g.filters + lane + o, row, rows, r, o, lane_width);
      } else {
        for (int64_t o = 0; o < rows; ++o)
          write_filter(gang_ * g.filters + row + o, lane, lanes, r, o * lane_width, 1);
      }
    }
  }

  // The sums of `count` channels of one filter: they lie at `at` of each tap's tile, `step` apart.
  void write_filter(int64_t filter, int64_t channel, int64_t count, int64_t row_block, int64_t at,
                    int64_t step) {
    const Plan<S>& p = *plan_;
    const int64_t taps = taps_.end - taps_.begin;
    const S* from = tile(sums_, row_block, taps_.begin) + at;
    if (step == 1) {
      for (int64_t c = 0; c < count; c += kLanes) {
        Square<S> by_tap = {}, by_channel;
        for (int64_t t = 0; t < taps; ++t)
          std::memcpy(by_tap[t], from + t * p.tile_size + c, sizeof(by_tap[t]));
        transpose(by_tap, by_channel);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - c); ++i)
          std::memcpy(&run_[(c + i) * taps], by_channel[i], sizeof(by_channel[i]));
      }
    } else {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t t = 0; t < taps; ++t) run_[c * taps + t] = from[t * p.tile_size + c * step];
    }
    const int64_t first = (filter * p.args.channels + channel) * p.taps + taps_.begin;
    const bool whole = taps == p.taps;  // all channels in one run
    const int64_t runs = whole ? 1 : count, length = whole ? count * taps : taps;
    if (!p.args.weight) {
      for (int64_t i = 0; i < runs; ++i)
        add_run(&run_[i * length], length, static_cast<S*>(p.args.out) + first + i * p.taps);
    } else {
      double& total = partials_[filter * p.slots() + slot_];
      if (p.args.weight_dtype == DType::f32)
        total += weighted<float>(first, runs, length);
      else
        total += weighted<T>(first, runs, length);
    }
  }

  void add_run(const S* from, int64_t length, S* to) const {
    if (first_ == 0)
      std::copy_n(from, length, to);
    else
      for (int64_t i = 0; i < length; ++i) to[i] += from[i];
  }

  // Σ weight²·run over runs that lie a channel apart in the weight.
  template <typename W>
  double weighted(int64_t first, int64_t runs, int64_t length) const {
    using V = typename Sum<T>::Vector;
    const Conv2dFisherArgs& g = plan_->args;
    const int64_t size = g.groups * g.filters * g.channels * plan_->taps;
    const W* weight = static_cast<const W*>(g.weight);
    V sum = {};
    for (int64_t k = 0; k < runs; ++k) {
      const int64_t begin = first + k * plan_->taps;
      const S* from = &run_[k * length];
      for (int64_t i = 0; i < length; i += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, length - i);
        const int64_t at = begin + i;
        const V w = __builtin_convertvector(
            n == kLanes ? load(weight + at) : load_first(weight + at, n, size - at), V);
        sum += w * (w * (n == kLanes ? load(from + i) : load_first(from + i, n)));
      }
    }
    return sum_lanes(sum);
  }

  const Plan<S>* plan_;
  const S *a_, *b_;
  double* partials_;
  int64_t first_, examples_;
  std::vector<S> sums_, gradients_, run_;
  Range rows_, taps_;
  int64_t gang_, lanes_, slot_;
};

template <typename T>
void run(const Conv2dFisherArgs& args, int threads) {
  using S = typename Sum<T>::Scalar;
  const Plan<S> plan(args);
  const int64_t products = args.batch * args.groups * args.filters * args.channels *
                           (plan.taps * args.out_height * args.out_width);
  threads = static_cast<int>(std::min<int64_t>(threads, products / kThreadProducts + 1));

  struct Free {
    void operator()(S* p) const { ::operator delete[](p, std::align_val_t(kRegisterBytes)); }
  };
  const std::unique_ptr<S[], Free> panels(static_cast<S*>(::operator new[](
      (plan.a_elements() + plan.b_elements()) * sizeof(S), std::align_val_t(kRegisterBytes))));
  S* b = panels.get();
  S* a = b + plan.b_elements();
  const int64_t filters = args.groups * args.filters;
  std::vector<double> partials(args.weight ? filters * plan.slots() : 0);
  for (int64_t first = 0; first < args.batch; first += plan.chunk) {
    const int64_t examples = std::min(plan.chunk, args.batch - first);
    using Pack = Packer<T>;
    ordered_tasks(Pack::tasks(plan, plan.a, examples) + Pack::tasks(plan, plan.b, examples),
                  threads, [&] { return Pack(plan, a, b, first, examples); });
    ordered_tasks(plan.tasks(), threads,
                  [&] { return Summer<T>(plan, a, b, partials.data(), first, examples); });
  }
  if (!args.weight) return;
  for (int64_t f = 0; f < filters; ++f) {
    double total = 0;
    for (int64_t s = 0; s < plan.slots(); ++s) total += partials[f * plan.slots() + s];
    static_cast<S*>(args.out)[f] = total;
  }
}

}  // namespace

void conv2d_fisher(const Conv2dFisherArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args, threads);
    case DType::f16:
      return run<Half>(args, threads);
    case DType::bf16:
      return run<BFloat16>(args, threads);
    case DType::f64:
      return run<double>(args, threads);
  }
}

}  // namespace TK_ISA
}  // namespace tk
